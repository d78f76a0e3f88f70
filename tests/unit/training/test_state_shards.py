"""Ranges of a tensor in memory order as boxes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from exo_megatron.training import state_shards
from exo_megatron.training.state_shards import blocks


@pytest.mark.parametrize("largest", [1, 5, 12, 1000])
@pytest.mark.parametrize("shape", [(7,), (5, 4), (1, 6), (3, 2, 4), (1, 1)])
def test_every_range_is_cut_into_boxes(shape: tuple[int, ...], largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cover it, once and in order, and few are needed: at most two for every axis, and those of the limit."""
    monkeypatch.setattr(state_shards, "LARGEST_BLOCK", largest)
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    for low in range(numbers.numel()):
        for high in range(low + 1, numbers.numel() + 1):
            found = list(blocks(low, high, shape))
            boxes = [
                numbers[tuple(slice(at, at + length) for at, length in zip(offset, size, strict=True))].flatten()
                for _, offset, size in found
            ]
            assert torch.cat(boxes).tolist() == list(range(low, high))
            assert [start for start, _, _ in found] == [int(box[0]) for box in boxes]
            assert all(len(box) <= largest for box in boxes)
            if largest == 1000:
                assert len(found) <= 2 * len(shape) - 1
            assert all(first[0] < second[0] for first, second in pairwise(found))
