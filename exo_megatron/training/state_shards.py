"""Weights and optimizer state as tensors of a checkpoint, of which every rank holds its own part.

megatron-core's distributed optimizer deals flat buffers to the data-parallel ranks, so a rank holds
some range of a weight's elements, in memory order. In a checkpoint a weight, its fp32 copy and its
moments have the weight's own shape and key. A range of a matrix is the end of a row, whole rows and
the beginning of a row: each such block is a shard of its own. Nothing is gathered to be saved, and
what is loaded goes straight to where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

LARGEST_BLOCK = 4 * 2**20
"""Elements of a block. What a rank reads at another cut is a whole number of blocks."""

_PREFIX = "optimizer.state"


def shards_of(
    parts: Sequence[DistributedOptimizer], model: Mapping[str, Any], *, weights: bool
) -> dict[str, ShardedTensor]:
    """List this rank's shards of the optimizer state, as views of the state itself.

    Args:
        parts: the optimizers, whose state is allocated.
        model: result of `sharded_state_dict()` of the model, whose tensors are the parameters.
        weights: list this rank's shards of the weights, too.

    Returns:
        Shards by names that differ.
    """
    places = {value.data: value for value in nested_values(model)}
    shards = {}
    for part in parts:
        for parameter, first, tensors in _held(part):
            named = {f"{_PREFIX}.{name}.": tensor for name, tensor in tensors.items()}
            if weights:
                own = parameter.data.view(-1)[first : first + len(tensors["param"])]
                named[""] = own
            for prefix, tensor in named.items():
                for shard in _cut(places[parameter], prefix, tensor.detach().view(-1), first):
                    shards[f"{shard.key}@{','.join(map(str, shard.global_offset))}"] = shard
    return shards


def _held(part: DistributedOptimizer) -> Iterator[tuple[Tensor, int, dict[str, Tensor]]]:
    """List what this rank holds: a parameter, its first element here, and its tensors of state."""
    for ranges in part.gbuf_ranges:
        for of_buckets in ranges.values():
            for bucket in of_buckets:
                for parameter, places in bucket["param_map"].items():
                    state = part._get_main_param_and_optimizer_states(parameter)
                    yield parameter, places["param"].start, {k: v for k, v in state.items() if k != "step"}


def _cut(place: Any, prefix: str, held: Tensor, first: int) -> Iterator[ShardedTensor]:
    """Cut the elements of a tensor from `first` on, held [n], into the blocks of its shards.

    place: where megatron-core has the whole tensor of this rank, as a shard or a factory of some.
    """
    # On the meta device, where the parts that a factory makes tell where they begin.
    whole = torch.empty(place.data.shape, dtype=held.dtype, device="meta")
    if isinstance(place, ShardedTensorFactory):
        made = list(nested_values(replace(place, data=whole).build()))
    else:
        made = [replace(place, data=whole, dtype=held.dtype)]
    for shard in made:
        if not shard.data.is_contiguous():
            raise ValueError(f"{shard.key} is stored in parts that do not lie together in memory")
        start = shard.data.storage_offset()
        low, high = max(first - start, 0), min(first + len(held) - start, shard.data.numel())
        if low >= high:
            continue
        stacked = shard.prepend_axis_num
        own = shard.global_offset[stacked:]
        for at, offset, size in blocks(low, high, tuple(shard.data.shape)):
            begin = start + at - first
            yield ShardedTensor(
                key=prefix + shard.key,
                data=held[begin : begin + math.prod(size)].view(*([1] * stacked), *size),
                dtype=held.dtype,
                local_shape=(*([1] * stacked), *size),
                global_shape=shard.global_shape,
                global_offset=(
                    *shard.global_offset[:stacked],
                    *(base + moved for base, moved in zip(own, offset, strict=True)),
                ),
                axis_fragmentations=None,  # no grid
                # Of the ranks of the data group each holds another range; those of other groups may hold the same.
                replica_id=(*shard.replica_id[:2], 0),
            )


def blocks(low: int, high: int, shape: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Cut the elements low to high of a tensor of this shape, in memory order, into boxes.

    Yields first element, offsets and sizes of each, in order. None has more than LARGEST_BLOCK
    elements.
    """
    row = math.prod(shape[1:])
    while low < high:
        index, within = divmod(low, row)
        if len(shape) > 1 and (within or row > min(high - low, LARGEST_BLOCK)):
            end = min(high, (index + 1) * row)
            for at, offset, size in blocks(within, end - index * row, shape[1:]):
                yield index * row + at, (index, *offset), (1, *size)
        else:
            rows = min(high - low, LARGEST_BLOCK) // row
            end = low + rows * row
            yield low, (index, *([0] * (len(shape) - 1))), (rows, *shape[1:])
        low = end
