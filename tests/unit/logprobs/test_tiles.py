"""How many of a micro-batch's logits exist at once, and how many stay."""

from __future__ import annotations

import pytest
import torch

from exo_megatron.logprobs.tiles import MIB, Tiling, plan_tiles

FP32, FP64 = torch.empty(0), torch.empty(0, dtype=torch.float64)


def test_all_logits_stay_where_they_fit() -> None:
    """2048 rows: 1024 columns are a tile of 8 MiB; the logits take 128 MiB, and 8 the tile at work."""
    assert plan_tiles(2048, 16384, FP32, memory_mib=136) == Tiling(1024, 16)
    assert plan_tiles(2048, 16384, FP32, memory_mib=135) == Tiling(1024, 15)
    assert plan_tiles(2048, 16384, FP32, memory_mib=8) == Tiling(1024, 0)


@pytest.mark.parametrize("weight", [FP32, FP64, torch.empty(0, dtype=torch.bfloat16)])
@pytest.mark.parametrize("memory_mib", [0.5, 3, 64, 1024])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 50257), (197, 32000), (2048, 16384), (8192, 128256)])
def test_memory_is_what_was_given(rows: int, vocabulary: int, memory_mib: float, weight: torch.Tensor) -> None:
    """Up to the narrowest tile. On the CPU half precision is multiplied in fp32."""
    tiling = plan_tiles(rows, vocabulary, weight, memory_mib=memory_mib)
    bytes_of_a_tile = tiling.columns * rows * max(weight.element_size(), 4)
    assert tiling.kept <= -(-vocabulary // tiling.columns)
    if tiling.columns > 256:
        assert bytes_of_a_tile * (1 + tiling.kept) <= memory_mib * MIB
    else:
        assert bytes_of_a_tile * tiling.kept <= memory_mib * MIB


def test_nothing_to_predict_and_nothing_to_hold() -> None:
    assert plan_tiles(0, 100, FP32, memory_mib=0).columns > 0
    assert plan_tiles(5, 0, FP32, memory_mib=1) == Tiling(1, 0)


def test_little_memory_is_not_spent_on_the_tile_at_work() -> None:
    """197 rows, 17 MiB: an eighth of it holds 2827 columns, in whole 256s 2816; 7 such tiles stay."""
    assert plan_tiles(197, 32000, FP32, memory_mib=17) == Tiling(2816, 7)


def test_no_memory_means_the_narrowest_tiles() -> None:
    assert plan_tiles(2048, 16384, FP32, memory_mib=0) == Tiling(256, 0)
