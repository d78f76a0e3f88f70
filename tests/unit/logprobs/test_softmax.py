"""How many of a micro-batch's logits exist at once, and how many stay."""

from __future__ import annotations

import pytest
import torch

from exo_megatron.logprobs.softmax import MIB, Tiling, plan_tiles

FP32, FP64 = torch.empty(0), torch.empty(0, dtype=torch.float64)


def test_all_logits_stay_where_they_fit() -> None:
    """1024 of 2048 rows: 2048 columns are a tile of 8 MiB; the logits take 128 MiB, and 8 the tile at work."""
    assert plan_tiles(2048, 16384, FP32, memory_mib=136) == Tiling(2048, 16, 1024)
    assert plan_tiles(2048, 16384, FP32, memory_mib=135) == Tiling(2048, 15, 1024)
    assert plan_tiles(2048, 16384, FP32, memory_mib=8) == Tiling(1024, 1, 1024)


@pytest.mark.parametrize("weight", [FP32, FP64, torch.empty(0, dtype=torch.bfloat16)])
@pytest.mark.parametrize("memory_mib", [0.5, 3, 64, 1024])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 50257), (197, 32000), (2048, 16384), (8192, 128256)])
def test_memory_is_what_was_given(rows: int, vocabulary: int, memory_mib: float, weight: torch.Tensor) -> None:
    """Up to the narrowest tile. On the CPU half precision is multiplied in fp32."""
    tiling = plan_tiles(rows, vocabulary, weight, memory_mib=memory_mib)
    bytes_of_a_tile = tiling.columns * (tiling.positions or 0) * max(weight.element_size(), 4)
    assert tiling.kept <= len(tiling.tiles(rows, vocabulary))
    if tiling.columns > 256:
        assert bytes_of_a_tile * (1 + tiling.kept) <= memory_mib * MIB
    else:
        assert bytes_of_a_tile * tiling.kept <= memory_mib * MIB


def test_nothing_to_predict_and_nothing_to_hold() -> None:
    assert plan_tiles(0, 100, FP32, memory_mib=0).columns > 0
    assert plan_tiles(5, 0, FP32, memory_mib=1) == Tiling(1, 0, 5)


def test_little_memory_is_not_spent_on_the_tile_at_work() -> None:
    """197 rows, 17 MiB: an eighth of it holds 2827 columns, in whole 256s 2816; 7 such tiles stay."""
    assert plan_tiles(197, 32000, FP32, memory_mib=17) == Tiling(2816, 7, 197)


def test_no_memory_means_the_narrowest_tiles() -> None:
    assert plan_tiles(2048, 16384, FP32, memory_mib=0) == Tiling(256, 0, 1024)


def test_many_rows_are_cut_evenly() -> None:
    """4097 rows are five times 820 at most; of 8 MiB of logits each has 2557 columns, in whole 256s 2304."""
    tiling = plan_tiles(4097, 16384, FP32, memory_mib=1024)
    assert tiling == Tiling(2304, 5 * 8, 820)


@pytest.mark.parametrize("tiling", [Tiling(4, 0, 3), Tiling(4, 0), Tiling(100, 0, 2), Tiling(1, 0, 1)], ids=str)
@pytest.mark.parametrize("shape", [(7, 10), (3, 4), (1, 1), (6, 8)])
def test_tiles_cover_every_logit_once(tiling: Tiling, shape: tuple[int, int]) -> None:
    covered = torch.zeros(shape)
    for tile in tiling.tiles(*shape):
        covered[tile.positions, tile.columns] += 1
        assert tile.columns.start == tile.number * tiling.columns
    assert torch.equal(covered, torch.ones(shape))


def test_no_rows_have_tiles_of_none() -> None:
    """The gradient of the weight is set to 0 tile by tile."""
    assert [tile.columns for tile in Tiling(4, 0).tiles(0, 6)] == [slice(0, 4), slice(4, 6)]
