"""What is known of the softmax over the vocabulary: on a rank tile by tile, then over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from exo_megatron.logprobs.projection import Head, Projection, place_in
from exo_megatron.logprobs.tiles import Tile
from exo_megatron.logprobs.tokens import Tokens


@dataclass(frozen=True)
class Softmax:
    """Of each row over the whole vocabulary: maximum m of x, sum of exp((x - m) / tau); and x of the tokens."""

    maximum: Tensor  # [M]
    total: Tensor  # [M]
    first: Tensor  # [M], of each row's first token
    extra: Tensor  # [N - M], of the others

    def logprobs(self, tokens: Tokens, head: Head) -> Tensor:
        """[N] in the order of the tokens."""
        log_total, tau = self.total.log(), head.temperature
        first = (self.first - self.maximum) / tau - log_total
        extra = (self.extra - self.maximum[tokens.extra_row]) / tau - log_total[tokens.extra_row]
        return first[tokens.row].index_copy_(0, tokens.extra, extra)

    def shares(self, maxima: Tensor, head: Head) -> Tensor:
        """[tiles, M]: what the exponentials relative to a tile's maximum [tiles, M] are to be multiplied with.

        Not below eps^2, so that 1/share is finite: a probability that small is 0 beside the others.
        """
        shares = torch.exp((maxima - self.maximum) / head.temperature) / self.total
        return shares.clamp_min_(torch.finfo(shares.dtype).eps ** 2)


@dataclass(frozen=True)
class TileStatistics:
    """What the forward pass over this rank's tiles has found so far. tiles: ranges of columns."""

    maxima: Tensor  # [tiles, M]
    totals: Tensor  # [tiles, M], relative to the tile's maximum
    first: Tensor  # [M], x of each row's first token; 0 where its target is not here
    extra: Tensor  # [N - M]

    @classmethod
    def empty(cls, projection: Projection, tokens: Tokens, tiles: int) -> TileStatistics:
        """For this many ranges of columns."""
        rows, extra = tokens.first_target.shape[0], tokens.extra.shape[0]
        shapes: tuple[tuple[int, ...], ...] = ((tiles, rows), (tiles, rows), (rows,), (extra,))
        return cls(*(projection.hidden.new_zeros(shape, dtype=projection.dtype) for shape in shapes))

    def enter_logits(self, tile: Tile, logits: Tensor, projection: Projection, tokens: Tokens) -> None:
        """Maximum and targets of a tile's x [m, v]."""
        torch.amax(logits, dim=1, out=self.maxima[tile.number, tile.rows])
        column, here = projection.local(tokens.first_target[tile.rows], tile.columns)
        self.first[tile.rows].add_(logits.gather(1, column[:, None])[:, 0] * here)
        column, here = projection.local(tokens.extra_target, tile.columns)
        row, inside = place_in(tokens.extra_row, tile.rows)
        self.extra.add_(logits[row, column] * (here & inside))

    def enter_exponentials(self, tile: Tile, exponentials: Tensor) -> None:
        """Sums of a tile's exponentials [m, v] relative to its maxima."""
        torch.sum(exponentials, dim=1, out=self.totals[tile.number, tile.rows])

    def over_ranks(self, head: Head) -> Softmax:
        """All tiles of all ranks, by one all-gather over the tensor group."""
        lowest = torch.finfo(self.maxima.dtype).min  # for a rank whose shard is all padding
        maximum = self.maxima.amax(dim=0) if len(self.maxima) else torch.full_like(self.first, lowest)
        local = Softmax(maximum, _sum(self.maxima, self.totals, maximum, head), self.first, self.extra)
        return local if head.shard.ranks == 1 else _gathered(local, head)


def _gathered(local: Softmax, head: Head) -> Softmax:
    sent = torch.cat((local.maximum, local.total, local.first, local.extra))
    received = sent.new_empty(head.shard.ranks * sent.shape[0])
    dist.all_gather_into_tensor(received, sent, group=head.shard.group)
    rows, extra = local.maximum.shape[0], local.extra.shape[0]
    parts = received.view(head.shard.ranks, -1).split((rows, rows, rows, extra), dim=1)
    maximum = parts[0].amax(dim=0)
    return Softmax(maximum, _sum(parts[0], parts[1], maximum, head), parts[2].sum(dim=0), parts[3].sum(dim=0))


def _sum(maxima: Tensor, totals: Tensor, maximum: Tensor, head: Head) -> Tensor:
    """Sums [parts, M] relative to each part's maximum -> their sum [M] relative to the common one [M]."""
    return (totals * torch.exp((maxima - maximum) / head.temperature)).sum(dim=0)
