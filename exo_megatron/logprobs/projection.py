"""A shard's share of the softmax over the vocabulary, tile by tile, as exponentials that the backward can multiply.

Letters: M rows, H hidden, m rows and v columns of a tile, tau the temperature. x are the logits of a tile before the
temperature (after the soft cap).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from exo_megatron.logprobs.tiles import Tile, Tiling
from exo_megatron.models.products import multiplicand, product
from exo_megatron.models.softcap import soft_cap_, soft_cap_slope


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary: padded rows [start, start + size) of which ids below `vocab_size` exist."""

    group: ProcessGroup | None
    rank: int
    ranks: int
    vocab_size: int

    def start(self, size: int) -> int:
        """First vocabulary id of this shard of `size` rows."""
        return self.rank * size

    def valid(self, size: int) -> int:
        """Rows of this shard that are real vocabulary, not padding."""
        return max(0, min(size, self.vocab_size - self.start(size)))


@dataclass(frozen=True)
class Head:
    """What turns products of hidden states and vocabulary rows into log-probs."""

    shard: VocabShard
    temperature: float
    softcap: float | None

    def slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of the soft cap at each of the capped logits, a new tensor; None without a soft cap: 1."""
        return None if self.softcap is None else soft_cap_slope(logits, self.softcap)


def place_in(index: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Place of each index in a part of a dimension, and whether it is there at all (if not, the place is any)."""
    place = index - part.start
    length = part.stop - part.start
    return place.clamp(0, length - 1), (place >= 0) & (place < length)


class Projection:
    """Hidden rows and this rank's vocabulary rows; products are accumulated in fp32 (fp64 for fp64)."""

    def __init__(self, hidden: Tensor, weight: Tensor, head: Head) -> None:
        """hidden [M, H], weight [Vp/t, H]."""
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.hidden = multiplicand(hidden.detach().to(weight.dtype))
        self.head = head
        self.start = head.shard.start(weight.shape[0])
        self.valid = head.shard.valid(weight.shape[0])
        self._weight = weight.detach()

    def tiles(self, tiling: Tiling) -> list[Tile]:
        """Of the hidden rows by the shard's real vocabulary rows."""
        return tiling.tiles(self.hidden.shape[0], self.valid)

    def weight(self, tile: Tile) -> Tensor:
        """[v, H], as `product` takes it; half precision on the CPU is cast here, a tile at a time."""
        return multiplicand(self._weight[tile.columns])

    def logits(self, tile: Tile, room: Tensor | None = None) -> Tensor:
        """x [m, v], in the given room or a new tensor."""
        hidden, weight = self.hidden[tile.rows], self.weight(tile).t()
        shape = (hidden.shape[0], weight.shape[1])
        out = None if room is None else room[: shape[0] * shape[1]].view(shape)
        return soft_cap_(product(hidden, weight, out=out), self.head.softcap)

    def room(self, tiles: Sequence[Tile]) -> Tensor:
        """For the logits of one of these tiles after another: new memory for each would cost more than its work."""
        return self.hidden.new_empty(max((tile.logits for tile in tiles), default=0), dtype=self.dtype)

    def exponentials_(self, logits: Tensor, maximum: Tensor) -> Tensor:
        """x, in place, becomes exp((x - maximum) / tau); maximum [m]."""
        logits.sub_(maximum[:, None])
        if self.head.temperature != 1.0:
            logits.mul_(1 / self.head.temperature)
        return logits.exp_()

    def factor(self, exponentials: Tensor, slope: Tensor | None) -> Tensor:
        """Exponentials, times the soft cap's slope (in place), in the type in which the backward multiplies them."""
        if slope is not None:
            exponentials.mul_(slope)
        return exponentials.to(self.hidden.dtype)

    def local(self, target: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """Place among the columns of each vocabulary id, and whether it is there at all (if not, the place is any)."""
        return place_in(target - self.start, columns)

    def rows(self, index: Tensor) -> Tensor:
        """[n, H] in `dtype`: rows of this rank's weight."""
        return self._weight[index].to(self.dtype)
