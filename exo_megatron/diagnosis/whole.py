"""Weights and gradients of a model that is cut over ranks, put together under HF's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from exo_megatron.checkpoint.dist_format import sharded_tensors, without_extra_state
from exo_megatron.conversion.rules import TensorRule
from exo_megatron.diagnosis.plain import NamedTensors
from exo_megatron.models.policy import PolicyModel
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.training.optimizer import Trainee

ByParameter = Mapping[torch.nn.Parameter, Tensor]
"""A tensor of the shape of each parameter of this rank, such as its gradient."""


def complete_gradients(trainee: Trainee) -> ByParameter:
    """Copy the gradients of this rank's parameters, summed over the model copies.

    After the reduction each rank of a data group has its part of every bucket: one all-gather over
    that group per bucket.
    """
    gradients: dict[torch.nn.Parameter, Tensor] = {}
    for buffer in (*trainee.model.buffers, *trainee.model.expert_parallel_buffers):
        group = buffer.data_parallel_group
        whole = torch.empty_like(buffer.grad_data)
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()
            parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, own, group=group)
            whole[bucket.offset : bucket.offset + bucket.grad_data.numel()] = torch.cat(parts)
        for parameter, (start, end, _) in buffer.param_index_map.items():
            gradients[parameter] = whole[start:end].view(parameter.shape)
    return gradients


def gather_tensors(
    model: PolicyModel, rules: Sequence[TensorRule], runtime: Runtime, values: ByParameter | None = None
) -> NamedTensors | None:
    """Gather the weights of a model by HF name on rank 0, on the CPU; None on the other ranks.

    Collective over the world. A part that ranks hold with different values is infinite.

    values: gathered in place of the weights. The model cannot be trained afterwards, because
    torch drops the hooks of a parameter that has held another dtype.
    """
    with _holding(model, values):
        state = without_extra_state(model.sharded_state_dict())
        shards = [
            (
                leaf.key,
                tuple(leaf.global_shape),
                leaf.prepend_axis_num,
                tuple(leaf.global_offset),
                leaf.data.detach().cpu(),
            )
            for leaf in sharded_tensors(state)
        ]
    gathered = runtime.gather_objects(shards)
    if gathered is None:
        return None
    whole: NamedTensors = {}
    for key, shape, stacked, offset, data in (shard for of_rank in gathered for shard in of_rank):
        whole.setdefault(key, torch.full(shape, torch.nan, dtype=data.dtype))
        place = tuple(slice(start, start + size) for start, size in zip(offset[stacked:], data.shape, strict=True))
        held = whole[key][offset[:stacked] + place]
        # Ranks that hold the same part must hold the same values: infinity differs from everything.
        held.copy_(data if held.isnan().all() or torch.equal(held, data) else torch.full_like(data, torch.inf))
    return _under_hf_names(whole, rules)


@contextmanager
def _holding(model: PolicyModel, values: ByParameter | None) -> Iterator[None]:
    """Let the parameters hold other values in a block."""
    if values is None:
        yield
        return
    weights = {parameter: parameter.data for parameter in model.parameters()}
    try:
        for parameter in weights:
            parameter.data = values[parameter]
        yield
    finally:
        for parameter, weight in weights.items():
            parameter.data = weight


def _under_hf_names(whole: NamedTensors, rules: Sequence[TensorRule]) -> NamedTensors:
    found: NamedTensors = {}
    for rule in rules:
        for entry in rule.entries():
            found |= zip(entry.sources, rule.transform.split(whole[rule.key][entry.index]), strict=True)
    return found
