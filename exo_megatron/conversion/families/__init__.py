"""The model families that can be converted, by the `model_type` of HF's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exo_megatron.conversion.families.llama import LLAMA
from exo_megatron.conversion.hf_config import HfConfig
from exo_megatron.conversion.rules import Family

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA,)}


def find_family(values: Mapping[str, Any], where: str) -> Family:
    """The family of an HF config. Raises CheckpointError for an unknown `model_type` or architecture.

    where: path of the config.json.
    """
    config = HfConfig(values, where)
    model_type = values.get("model_type")
    if model_type not in FAMILIES:
        raise config.unsupported("model_type", model_type, f"one of {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[model_type]
    architectures = values.get("architectures") or list(family.architectures)
    if architectures[0] not in family.architectures:
        raise config.unsupported("architectures", architectures, f"one of {', '.join(family.architectures)}")
    if values.get("quantization_config") is not None:
        raise config.unsupported("quantization_config", "set", "weights that are not quantised")
    return family
