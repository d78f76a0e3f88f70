"""Softmax over one shard of the vocabulary, tile by tile, and its statistics over all ranks.

Letters: M predicting positions, H hidden, m positions and v columns of a tile, tau the temperature. x
are the logits of a tile before the temperature (after the soft cap).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from exo_megatron.models.numerics import multiplicand, product, soft_cap_, soft_cap_slope

MIB = 2**20
# Logits in one tile. CPU: 8 MiB in fp32, which the elementwise work finds in the last-level cache,
# of so many positions at most: products of taller and narrower matrices are slower. CUDA: matrices large
# enough to keep the device busy.
_TILE_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
_MOST_POSITIONS = {"cpu": 2**10, "cuda": 2**26}
# Narrower tiles cost time (each scales its positions, [M, H], twice), so only a lack of memory makes
# them.
_GOOD_COLUMNS, _MIN_COLUMNS = 1024, 256
_SHARE_AT_WORK = 8


@dataclass(frozen=True)
class Tile:
    """A tile of the logits: predicting positions by columns of the vocabulary shard.

    `number` counts the ranges of columns.
    """

    positions: slice
    columns: slice
    number: int

    @property
    def logits(self) -> int:
        """Number of logits in the tile."""
        height, width = (len(range(part.start, part.stop)) for part in (self.positions, self.columns))
        return height * width


@dataclass(frozen=True)
class Tiling:
    """Tiles of `positions` (None: all) by `columns`; the last ones may be smaller.

    The first `kept` tiles are kept for the backward pass.
    """

    columns: int
    kept: int
    positions: int | None = None

    def tiles(self, positions: int, vocabulary: int) -> list[Tile]:
        """List all tiles of [positions, vocabulary], block of positions by block of positions.

        With no position there is still one block, of empty tiles.
        """
        height = self.positions or max(positions, 1)
        return [
            Tile(
                slice(top, min(top + height, positions)),
                slice(left, min(left + self.columns, vocabulary)),
                left // self.columns,
            )
            for top in range(0, max(positions, 1), height)
            for left in range(0, vocabulary, self.columns)
        ]


def plan_tiles(positions: int, vocabulary: int, weight: torch.Tensor, *, memory_mib: float) -> Tiling:
    """Plan the tiles of the logits [positions, vocabulary] of one micro-batch on this rank.

    Kept tiles have the dtype in which they are multiplied: the weight's own on CUDA, fp32 for half
    precision elsewhere.

    Args:
        positions: M, the predicting ones.
        vocabulary: columns of this rank's shard without padding.
        weight: gives device and dtype.
        memory_mib: MiB for the tile being computed (an eighth of it, where that is wide enough) and
            the kept ones together. A tile has at least 256 columns, even if it then exceeds this.
    """
    device = weight.device.type
    at_work = 8 if weight.dtype == torch.float64 else 4
    kept = weight.element_size() if weight.is_cuda else at_work
    blocks = max(-(-positions // _MOST_POSITIONS[device]), 1)
    height = max(-(-positions // blocks), 1)
    memory = int(memory_mib * MIB)
    affordable = memory // (at_work * height)
    columns = min(_TILE_ELEMENTS[device] // height, max(affordable // _SHARE_AT_WORK, _GOOD_COLUMNS))
    columns = min(columns, affordable)
    columns = min(max(columns // _MIN_COLUMNS, 1) * _MIN_COLUMNS, max(vocabulary, 1))
    fitting = (memory - at_work * height * columns) // (kept * height * columns)
    return Tiling(columns, min(max(fitting, 0), blocks * -(-vocabulary // columns)), height)


@dataclass(frozen=True)
class Tokens:
    """N candidate tokens predicted at M positions.

    The first token of each position is stored apart from the N - M extra ones of positions that
    predict several.
    """

    position: Tensor  # [N]
    first_target: Tensor  # [M]
    extra: Tensor  # [N - M], which of the N these are
    extra_position: Tensor
    extra_target: Tensor

    @classmethod
    def of(cls, position: Tensor, target: Tensor, positions: int) -> Tokens:
        """Divide tokens into first and extra ones, without waiting for the device.

        Args:
            position: [N] int64 non-decreasing, in which each of 0..M-1 occurs.
            target: [N] int64 vocabulary ids.
            positions: M.
        """
        first = torch.searchsorted(position, torch.arange(positions, device=position.device))
        repeats = torch.zeros_like(position)
        repeats[1:] = position[1:] == position[:-1]
        # Sorted, not selected by the mask: how many there are is known without asking the device.
        extra = torch.argsort(repeats, stable=True)[positions:]
        return cls(position, target[first], extra, position[extra], target[extra])


@dataclass(frozen=True)
class VocabShard:
    """This rank's padded vocabulary rows [start, start + size); ids below `vocab_size` are real."""

    group: ProcessGroup | None
    rank: int
    ranks: int
    vocab_size: int

    def start(self, size: int) -> int:
        """Return the first vocabulary id of this rank's shard of `size` rows."""
        return self.rank * size

    def valid(self, size: int) -> int:
        """Count the rows of this rank's shard of `size` rows that are not padding."""
        return max(0, min(size, self.vocab_size - self.start(size)))


@dataclass(frozen=True)
class Head:
    """Parameters that turn products of hidden states and vocabulary rows into log-probs."""

    shard: VocabShard
    temperature: float
    softcap: float | None

    def slope(self, logits: Tensor) -> Tensor | None:
        """Compute the derivative of the soft cap at each of the capped logits, as a new tensor.

        None without a soft cap, where the derivative is 1.
        """
        return None if self.softcap is None else soft_cap_slope(logits, self.softcap)


def place_in(index: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Return the place of each index in a part of a dimension, and whether it is in that part.

    Where it is not, the place is some valid one.
    """
    place = index - part.start
    length = part.stop - part.start
    return place.clamp(0, length - 1), (place >= 0) & (place < length)


class Projection:
    """Product of hidden states and this rank's vocabulary rows, accumulated in fp32 or fp64."""

    def __init__(self, hidden: Tensor, weight: Tensor, head: Head) -> None:
        """Prepare hidden [M, H] and weight [Vp/t, H] for products."""
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.hidden = multiplicand(hidden.detach().to(weight.dtype))
        self.head = head
        self.start = head.shard.start(weight.shape[0])
        self.valid = head.shard.valid(weight.shape[0])
        self._weight = weight.detach()

    def tiles(self, tiling: Tiling) -> list[Tile]:
        """List the tiles of all hidden states by this shard's real vocabulary rows."""
        return tiling.tiles(self.hidden.shape[0], self.valid)

    def weight(self, tile: Tile) -> Tensor:
        """Return the tile's weight [v, H] in the form that `product` takes.

        Half precision on the CPU is cast here, one tile at a time.
        """
        return multiplicand(self._weight[tile.columns])

    def logits(self, tile: Tile, buffer: Tensor | None = None) -> Tensor:
        """Compute x [m, v], in `buffer` or a new tensor."""
        hidden, weight = self.hidden[tile.positions], self.weight(tile).t()
        shape = (hidden.shape[0], weight.shape[1])
        out = None if buffer is None else buffer[: shape[0] * shape[1]].view(shape)
        return soft_cap_(product(hidden, weight, out=out), self.head.softcap)

    def buffer(self, tiles: Sequence[Tile]) -> Tensor:
        """Allocate memory for the logits of the largest of these tiles, to be reused for each.

        Allocating new memory for each tile would take longer than computing it.
        """
        return self.hidden.new_empty(max((tile.logits for tile in tiles), default=0), dtype=self.dtype)

    def exponentials_(self, logits: Tensor, maximum: Tensor) -> Tensor:
        """Compute exp((x - maximum) / tau) in place of x [m, v]; maximum [m]."""
        logits.sub_(maximum[:, None])
        if self.head.temperature != 1.0:
            logits.mul_(1 / self.head.temperature)
        return logits.exp_()

    def factor(self, exponentials: Tensor, slope: Tensor | None) -> Tensor:
        """Multiply exponentials by the soft cap's slope in place, and cast them.

        The result has the dtype in which the backward multiplies it.
        """
        if slope is not None:
            exponentials.mul_(slope)
        return exponentials.to(self.hidden.dtype)

    def local(self, target: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """Return the place of each vocabulary id among the columns, and whether it is there.

        See `place_in`.
        """
        return place_in(target - self.start, columns)

    def weight_at(self, index: Tensor) -> Tensor:
        """Return rows of this rank's weight, [n, H] in `dtype`."""
        return self._weight[index].to(self.dtype)


@dataclass(frozen=True)
class Softmax:
    """Softmax statistics of each position over the whole vocabulary.

    They are the maximum m of x, the sum of exp((x - m) / tau), and x of the tokens.
    """

    maximum: Tensor  # [M]
    total: Tensor  # [M]
    first: Tensor  # [M], of each position's first token
    extra: Tensor  # [N - M], of the others

    def logprobs(self, tokens: Tokens, head: Head) -> Tensor:
        """Compute the log-probs [N] of the tokens, in their order, in nats."""
        log_total, tau = self.total.log(), head.temperature
        first = (self.first - self.maximum) / tau - log_total
        extra = (self.extra - self.maximum[tokens.extra_position]) / tau - log_total[tokens.extra_position]
        return first[tokens.position].index_copy_(0, tokens.extra, extra)

    def shares(self, maxima: Tensor, head: Head) -> Tensor:
        """Compute the factors [tiles, M] that turn a tile's exponentials into probabilities.

        maxima: [tiles, M]. The factors are at least eps^2, so that 1 / share is finite: a
        probability that small is 0 beside the others.
        """
        shares = torch.exp((maxima - self.maximum) / head.temperature) / self.total
        return shares.clamp_min_(torch.finfo(shares.dtype).eps ** 2)


@dataclass(frozen=True)
class TileStatistics:
    """Statistics collected in the forward pass over this rank's tiles. tiles: ranges of columns."""

    maxima: Tensor  # [tiles, M]
    totals: Tensor  # [tiles, M], relative to the tile's maximum
    first: Tensor  # [M], x of each position's first token; 0 where its target is not here
    extra: Tensor  # [N - M]

    @classmethod
    def empty(cls, projection: Projection, tokens: Tokens, tiles: int) -> TileStatistics:
        """Allocate statistics for this many ranges of columns."""
        first, extra = tokens.first_target.shape[0], tokens.extra.shape[0]
        shapes: tuple[tuple[int, ...], ...] = ((tiles, first), (tiles, first), (first,), (extra,))
        return cls(*(projection.hidden.new_zeros(shape, dtype=projection.dtype) for shape in shapes))

    def enter_logits(self, tile: Tile, logits: Tensor, projection: Projection, tokens: Tokens) -> None:
        """Record the maxima by position of a tile's x [m, v], and x of the targets in it."""
        torch.amax(logits, dim=1, out=self.maxima[tile.number, tile.positions])
        column, here = projection.local(tokens.first_target[tile.positions], tile.columns)
        self.first[tile.positions].add_(logits.gather(1, column[:, None])[:, 0] * here)
        column, here = projection.local(tokens.extra_target, tile.columns)
        position, inside = place_in(tokens.extra_position, tile.positions)
        self.extra.add_(logits[position, column] * (here & inside))

    def enter_exponentials(self, tile: Tile, exponentials: Tensor) -> None:
        """Record the sums by position of a tile's exponentials [m, v], which are relative to its maxima."""
        torch.sum(exponentials, dim=1, out=self.totals[tile.number, tile.positions])

    def over_ranks(self, head: Head) -> Softmax:
        """Combine all tiles of all ranks, by one all-gather over the tensor group."""
        lowest = torch.finfo(self.maxima.dtype).min  # for a rank whose shard is all padding
        maximum = self.maxima.amax(dim=0) if len(self.maxima) else torch.full_like(self.first, lowest)
        local = Softmax(maximum, _sum(self.maxima, self.totals, maximum, head), self.first, self.extra)
        return local if head.shard.ranks == 1 else _gathered(local, head)


def _gathered(local: Softmax, head: Head) -> Softmax:
    sent = torch.cat((local.maximum, local.total, local.first, local.extra))
    received = sent.new_empty(head.shard.ranks * sent.shape[0])
    dist.all_gather_into_tensor(received, sent, group=head.shard.group)
    first, extra = local.maximum.shape[0], local.extra.shape[0]
    parts = received.view(head.shard.ranks, -1).split((first, first, first, extra), dim=1)
    maximum = parts[0].amax(dim=0)
    return Softmax(maximum, _sum(parts[0], parts[1], maximum, head), parts[2].sum(dim=0), parts[3].sum(dim=0))


def _sum(maxima: Tensor, totals: Tensor, maximum: Tensor, head: Head) -> Tensor:
    """Combine sums [parts, M], relative to each part's maximum, relative to the common one.

    maxima: [parts, M]. maximum: [M]. Returns [M].
    """
    return (totals * torch.exp((maxima - maximum) / head.temperature)).sum(dim=0)
