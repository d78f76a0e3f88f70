"""Sharded tensors of megatron-core by the keys and places that a checkpoint gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from exo_megatron.models.policy import PolicyModel

Place = tuple[str, tuple[slice, ...]]
"""A key of the checkpoint and where in that tensor a rank's part lies, stacked axes included."""


def parts_of(model: PolicyModel, pick: Callable[[Tensor], Tensor]) -> Iterator[tuple[Place, Tensor]]:
    """Where each part of this rank's parameters lies, and that part of `pick(parameter)` (a view of it)."""
    for value in nested_values(model.sharded_state_dict()):
        picked = pick(value.data)
        factory = isinstance(value, ShardedTensorFactory)
        own = {"data": picked} if factory else {"data": picked, "dtype": picked.dtype}
        shards = nested_values(replace(value, **own).build()) if factory else [replace(value, **own)]
        for shard in shards:
            assert isinstance(shard, ShardedTensor)
            yield _place(shard), shard.data


def _place(shard: ShardedTensor) -> Place:
    stack = shard.prepend_axis_num
    slices = [slice(at, at + 1) for at in shard.global_offset[:stack]]
    own = zip(shard.global_offset[stack:], shard.local_shape, strict=True)
    return shard.key, (*slices, *(slice(at, at + size) for at, size in own))


def joined(shards: Iterable[ShardedTensor]) -> dict[str, Tensor]:
    """Put shards that cover each tensor once together, by key; the stacked axes in front."""
    whole: dict[str, Tensor] = {}
    covered: dict[str, int] = {}
    for shard in shards:
        key, place = _place(shard)
        tensor = whole.setdefault(key, torch.full(shard.global_shape, torch.nan, dtype=shard.data.dtype))
        tensor[place] = shard.data.detach().view(tensor[place].shape)
        covered[key] = covered.get(key, 0) + shard.data.numel()
    assert all(covered[key] == tensor.numel() and not tensor.isnan().any() for key, tensor in whole.items())
    return whole
