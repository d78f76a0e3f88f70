"""How much of the logits exists at once, and how much of it stays for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MIB = 2**20
# Logits in one tile. CPU: 8 MiB in fp32, which the elementwise work finds in the last-level cache. CUDA: matrices
# large enough to keep the device busy.
_TILE_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
# Narrower tiles cost time (each scales [M, H] twice), so only a lack of memory makes them.
_GOOD_COLUMNS, _MIN_COLUMNS = 1024, 256
_SHARE_AT_WORK = 8


@dataclass(frozen=True)
class Tiling:
    """A tile is all rows by `columns` of the vocabulary shard. The first `kept` tiles stay for the backward pass."""

    columns: int
    kept: int


def plan_tiles(rows: int, vocabulary: int, weight: torch.Tensor, *, memory_mib: float) -> Tiling:
    """Tiles of the logits [rows, vocabulary] of one micro-batch on this rank.

    memory_mib: what the tile at work (an eighth, where that is wide enough) and the kept ones may take together; a
    tile is not narrower than 256 columns, whatever that takes. Kept ones have the type in which they are multiplied:
    the weight's own on CUDA, fp32 for half precision elsewhere.
    """
    at_work = 8 if weight.dtype == torch.float64 else 4
    kept = weight.element_size() if weight.is_cuda else at_work
    rows = max(rows, 1)
    memory = int(memory_mib * MIB)
    affordable = memory // (at_work * rows)
    columns = min(_TILE_ELEMENTS[weight.device.type] // rows, max(affordable // _SHARE_AT_WORK, _GOOD_COLUMNS))
    columns = min(columns, affordable)
    columns = min(max(columns // _MIN_COLUMNS, 1) * _MIN_COLUMNS, max(vocabulary, 1))
    room = (memory - at_work * rows * columns) // (kept * rows * columns)
    return Tiling(columns, min(max(room, 0), -(-vocabulary // columns)))
