"""How much of the logits exists at once, and how much of it stays for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MIB = 2**20
# Logits in one tile. CPU: 8 MiB in fp32, which the elementwise work finds in the last-level cache, of so many rows at
# most: products of taller and narrower matrices are slower. CUDA: matrices large enough to keep the device busy.
_TILE_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
_MOST_ROWS = {"cpu": 2**10, "cuda": 2**26}
# Narrower tiles cost time (each scales its rows' [M, H] twice), so only a lack of memory makes them.
_GOOD_COLUMNS, _MIN_COLUMNS = 1024, 256
_SHARE_AT_WORK = 8


@dataclass(frozen=True)
class Tile:
    """Rows by columns of the vocabulary shard; `number` counts the ranges of columns."""

    rows: slice
    columns: slice
    number: int

    @property
    def logits(self) -> int:
        """How many it has."""
        rows, columns = (len(range(part.start, part.stop)) for part in (self.rows, self.columns))
        return rows * columns


@dataclass(frozen=True)
class Tiling:
    """Tiles of `rows` (None: all) by `columns`, the last ones smaller. The first `kept` stay for the backward pass."""

    columns: int
    kept: int
    rows: int | None = None

    def tiles(self, rows: int, vocabulary: int) -> list[Tile]:
        """All tiles of [rows, vocabulary]: all columns of the first rows, and so on. No rows are cut like some."""
        height = self.rows or max(rows, 1)
        return [
            Tile(
                slice(top, min(top + height, rows)),
                slice(left, min(left + self.columns, vocabulary)),
                left // self.columns,
            )
            for top in range(0, max(rows, 1), height)
            for left in range(0, vocabulary, self.columns)
        ]


def plan_tiles(rows: int, vocabulary: int, weight: torch.Tensor, *, memory_mib: float) -> Tiling:
    """Tiles of the logits [rows, vocabulary] of one micro-batch on this rank.

    memory_mib: what the tile at work (an eighth, where that is wide enough) and the kept ones may take together; a
    tile is not narrower than 256 columns, whatever that takes. Kept ones have the type in which they are multiplied:
    the weight's own on CUDA, fp32 for half precision elsewhere.
    """
    device = weight.device.type
    at_work = 8 if weight.dtype == torch.float64 else 4
    kept = weight.element_size() if weight.is_cuda else at_work
    blocks = max(-(-rows // _MOST_ROWS[device]), 1)
    height = max(-(-rows // blocks), 1)
    memory = int(memory_mib * MIB)
    affordable = memory // (at_work * height)
    columns = min(_TILE_ELEMENTS[device] // height, max(affordable // _SHARE_AT_WORK, _GOOD_COLUMNS))
    columns = min(columns, affordable)
    columns = min(max(columns // _MIN_COLUMNS, 1) * _MIN_COLUMNS, max(vocabulary, 1))
    room = (memory - at_work * height * columns) // (kept * height * columns)
    return Tiling(columns, min(max(room, 0), blocks * -(-vocabulary // columns)), height)
