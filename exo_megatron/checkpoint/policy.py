"""From a checkpoint to a policy in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from exo_megatron.checkpoint.collective import together
from exo_megatron.checkpoint.directory import read_spec, resolve_checkpoint, weights_path
from exo_megatron.checkpoint.dist_format import template_shapes
from exo_megatron.checkpoint.integrity import verify_together
from exo_megatron.checkpoint.load import load_module, load_sharded
from exo_megatron.checkpoint.tensors import OPTIMIZER_PREFIX
from exo_megatron.checkpoint.unpickling import read_metadata, tensor_entries
from exo_megatron.config.sections import ComputeConfig
from exo_megatron.errors import CheckpointError
from exo_megatron.models.build import build_policy
from exo_megatron.models.policy import PolicyModel
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.topology import Topology


def load_policy(path: Path, topology: Topology, compute: ComputeConfig) -> tuple[PolicyModel, ModelSpec]:
    """Find, verify and load the model of a checkpoint at this topology, in `compute.precision`.

    path: a checkpoint, or the output of a training stage (its newest complete step). Collective over the world.
    Raises CheckpointError if there is none, if a file is damaged, or if the tensors are not those of its model.json.
    """
    return load_checkpoint(together(lambda: resolve_checkpoint(path)), topology, compute)


def load_checkpoint(checkpoint: Path, topology: Topology, compute: ComputeConfig) -> tuple[PolicyModel, ModelSpec]:
    """`load_policy` from the very directory of a checkpoint, which may be one that is not yet in its place."""
    verify_together(checkpoint)
    spec = together(lambda: read_spec(checkpoint))
    model = build_policy(spec, topology, compute)
    template = model.sharded_state_dict()
    wanted = _all_keys(template)
    together(lambda: _check_no_more(checkpoint, wanted))
    load_module(model, load_sharded(checkpoint, template), str(checkpoint))
    return model, spec


def _all_keys(template: dict[str, Any]) -> set[str]:
    """Tensor keys that any rank asks for: pipeline stages hold different ones. Collective over the world."""
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, sorted(template_shapes(template)))
    return {key for keys in gathered for key in keys}


def _check_no_more(checkpoint: Path, wanted: set[str]) -> None:
    """Refuse tensors that the model would not load and thus silently lose, such as biases."""
    stored = tensor_entries(read_metadata(weights_path(checkpoint)))
    extra = sorted(key for key in stored if key not in wanted and not key.startswith(OPTIMIZER_PREFIX))
    if extra:
        raise CheckpointError(
            str(checkpoint),
            f"holds {extra[0]}, which the model of its model.json does not have",
            expected="the tensors of the model and no others",
            fix="convert the HF checkpoint again",
        )
