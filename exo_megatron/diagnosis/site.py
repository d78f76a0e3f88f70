"""The surroundings of the checks of correctness: the world, a directory, small models in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from exo_megatron.checkpoint.load import load_model
from exo_megatron.config.sections import ComputeConfig
from exo_megatron.diagnosis.small_models import SmallModel
from exo_megatron.execution.policy import Policy
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import Topology

Precision = Literal["fp32", "bf16"]

FP32_LIMIT = 2e-5
"""Largest relative error (L2, of any tensor) of fp32 arithmetic against fp64."""
BF16_FACTOR = 2.0
"""In bf16 our error may be this many times that of plain torch in bf16."""


@dataclass(frozen=True)
class Site:
    """The world, and the small models, which every rank can read in `directory`."""

    runtime: Runtime
    directory: Path
    dense: SmallModel
    experts: SmallModel

    @property
    def device(self) -> torch.device:
        """The device that is checked."""
        return self.runtime.device


def load_small(model: SmallModel, topology: Topology, precision: Precision) -> Policy:
    """Load a small model's checkpoint on the device. Collective over the world."""
    compute = ComputeConfig(precision=precision, max_tokens_per_microbatch=model.max_tokens)
    return Policy(load_model(model.checkpoint, topology, compute), topology, compute)


def relative_error(ours: Tensor, wanted: Tensor) -> float:
    """Compute |ours - wanted| / |wanted| in L2 norms, in fp64 on the CPU."""
    wide = wanted.detach().double().cpu()
    difference = torch.linalg.vector_norm(ours.detach().double().cpu() - wide)
    return float(difference / torch.linalg.vector_norm(wide))


def errors_by_name(ours: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
    """Compute the relative error of every tensor, [n]; infinity where one is not a number."""
    if ours.keys() != wanted.keys():
        raise ValueError(f"tensors {sorted(ours.keys() ^ wanted.keys())[:3]} are on one side only")
    errors = torch.tensor([relative_error(ours[name], tensor) for name, tensor in wanted.items()])
    return errors.nan_to_num(nan=torch.inf)
