"""The model families that can be converted. To add one, add a file here and a line in FAMILIES."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exo_megatron.conversion.families.chatglm import CHATGLM
from exo_megatron.conversion.families.gemma2 import GEMMA2
from exo_megatron.conversion.families.gemma3 import GEMMA3
from exo_megatron.conversion.families.glm import GLM
from exo_megatron.conversion.families.glm4 import GLM4
from exo_megatron.conversion.families.gpt2 import GPT2
from exo_megatron.conversion.families.gpt_neox import GPT_NEOX
from exo_megatron.conversion.families.llama import LLAMA
from exo_megatron.conversion.families.mistral import MISTRAL
from exo_megatron.conversion.families.mixtral import MIXTRAL
from exo_megatron.conversion.families.phi3 import PHI3
from exo_megatron.conversion.families.qwen2 import QWEN2
from exo_megatron.conversion.families.qwen3 import QWEN3
from exo_megatron.conversion.families.qwen3_moe import QWEN3_MOE
from exo_megatron.conversion.hf_config import HfConfig
from exo_megatron.conversion.rules import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        CHATGLM,
        GEMMA2,
        GEMMA3,
        GLM,
        GLM4,
        GPT2,
        GPT_NEOX,
        LLAMA,
        MISTRAL,
        MIXTRAL,
        PHI3,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
    )
}

_REFUSED = {"gemma3": "it holds a vision model too; its language model alone is of type gemma3_text"}
"""Model types that could be mistaken for a family, with the reason why they are none."""


def find_family(values: Mapping[str, Any], where: str) -> Family:
    """Find the family of an HF config. `where` is the path of the config.json.

    Raises CheckpointError for an unknown `model_type` or architecture, and for quantised weights.
    """
    config = HfConfig(values, where)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        why = _REFUSED.get(model_type, "") if isinstance(model_type, str) else ""
        raise config.unsupported("model_type", model_type, f"one of {', '.join(sorted(FAMILIES))}", why)
    family = FAMILIES[model_type]
    architectures = values.get("architectures") or list(family.architectures)
    if not isinstance(architectures, list) or architectures[0] not in family.architectures:
        raise config.unsupported("architectures", architectures, f"one of {', '.join(family.architectures)}")
    if values.get("quantization_config") is not None:
        raise config.unsupported("quantization_config", "set", "weights that are not quantised")
    return family
