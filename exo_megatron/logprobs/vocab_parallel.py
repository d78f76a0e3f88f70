"""Log-probs of response tokens from hidden states, on vocabulary shards, in fp32, a tile of the vocabulary at a time.

Letters: M predicting rows, N response tokens (N >= M: K first tokens share one row), H hidden, V vocabulary,
Vp padded vocabulary, t tensor-parallel size, m rows and v columns of a tile, x logits before the temperature tau.

A tile's logits become E = exp((x - max) / tau) in place, max being the row's maximum in the tile; the row's softmax on
the tile is E times one number per row, `share`. With R the sum of a row's token gradients and T its first token's
target,

    d x = -R/tau share (E - onehot(T) / share)  +  what the row's other tokens add: g/tau (onehot(target) - onehot(T))

so the forward pass puts E - 1/share at the target and nothing in the backward pass touches each logit: R, share and
tau scale the [M, H] factors of the two products. softmax - onehot is formed in fp32 even where E is multiplied in half
precision, and nothing is divided by R, which is 0 for rows whose K tokens have an objective's coefficients.

Tiles that were kept from the forward pass cost 4 M H V/t FLOPs in the backward pass, the others 6. The only
communication is one all-gather of 2 M + N floats per rank. Forward and backward never wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from exo_megatron.logprobs.projection import Head, Projection, VocabShard
from exo_megatron.logprobs.statistics import Softmax, TileStatistics
from exo_megatron.logprobs.tiles import Tile, Tiling
from exo_megatron.logprobs.tokens import Tokens
from exo_megatron.logprobs.weight_gradient import WeightGradient
from exo_megatron.models.products import product


def sharded_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_row: Tensor,
    token_target: Tensor,
    shard: VocabShard,
    *,
    temperature: float,
    tiling: Tiling,
    softcap: float | None = None,
) -> Tensor:
    """log softmax(hidden W^T / temperature)[target] for N response tokens, differentiable.

    softcap: logits become softcap * tanh(logits / softcap) before the temperature divides them.

    hidden [M, H], complete on every rank; weight [Vp/t, H], this rank's rows; token_row [N] int64 non-decreasing
    index into hidden, with every row in it; token_target [N] int64. Returns [N] fp32 (fp64 for fp64 weights), equal
    on all ranks.

    Collectives: one all-gather of 2 M + N elements over shard.group, forward only. The gradient of `hidden` is this
    rank's partial sum over its vocabulary; the caller's region function reduces it over the group (models/policy.py).
    The inputs are not modified, but for a weight with megatron-core's `main_grad`, to which its gradient is added.
    """
    apply: Callable[..., Tensor] = _ShardedLogProbs.apply
    differentiated = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    tiling = tiling if differentiated else replace(tiling, kept=0)
    return apply(hidden, weight, token_row, token_target, Head(shard, temperature, softcap), tiling)


class _ShardedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, token_row: Tensor, token_target: Tensor, head: Head, tiling: Tiling
    ) -> Tensor:
        projection = Projection(hidden, weight, head)
        tokens = Tokens.of(token_row, token_target, hidden.shape[0])
        tiles = projection.tiles(tiling)
        statistics = TileStatistics.empty(projection, tokens, tiles[-1].number + 1 if tiles else 0)
        kept = [_forward_tile(tile, projection, tokens, statistics) for tile in tiles[: tiling.kept]]
        room = projection.room(tiles[len(kept) :])
        for tile in tiles[len(kept) :]:
            _enter_tile(tile, projection.logits(tile, room), projection, tokens, statistics)
        softmax = statistics.over_ranks(head)
        marks = _Marks(projection, tokens, softmax, statistics.maxima, softmax.shares(statistics.maxima, head))
        for factor, tile in zip(kept, tiles, strict=False):
            marks.put_(factor, tile)
        ctx.save_for_backward(hidden, weight, marks.maxima, marks.shares, *kept)
        ctx.head, ctx.tiling, ctx.tokens, ctx.softmax = head, tiling, tokens, softmax
        return softmax.logprobs(tokens, head)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        hidden, weight, maxima, shares, *kept = ctx.saved_tensors
        projection = Projection(hidden, weight, ctx.head)
        marks = _Marks(projection, ctx.tokens, ctx.softmax, maxima, shares)
        grad = grads[0].to(projection.dtype) / ctx.head.temperature
        row_grad = grad.new_zeros(hidden.shape[0]).index_put_((ctx.tokens.row,), grad, accumulate=True)
        d_hidden = torch.zeros(hidden.shape, dtype=projection.dtype, device=hidden.device)
        d_weight = WeightGradient(weight, projection.dtype) if ctx.needs_input_grad[1] else None
        tiles = projection.tiles(ctx.tiling)
        room = projection.room(tiles[len(kept) :])
        row_room = torch.empty_like(d_hidden[tiles[0].rows]) if tiles else d_hidden
        for index, tile in enumerate(tiles):
            factor = kept[index] if index < len(kept) else marks.recomputed(tile, room)
            own, rows = d_hidden[tile.rows], row_room[: factor.shape[0]]
            scale = (-row_grad[tile.rows] * shares[tile.number, tile.rows])[:, None]
            own.addcmul_(product(factor, projection.weight(tile), out=rows), scale)
            if d_weight is not None:
                right = torch.mul(projection.hidden[tile.rows], scale, out=rows).to(factor.dtype)
                d_weight.add(tile.columns, factor.t(), right, first=tile.rows.start == 0)
        if d_weight is not None:
            d_weight.no_rows_from(projection.valid)
        _add_extra_tokens(d_hidden, d_weight, marks, grad)
        weight_grad = None if d_weight is None else d_weight.for_autograd()
        return d_hidden.to(hidden.dtype), weight_grad, None, None, None, None


def _forward_tile(tile: Tile, projection: Projection, tokens: Tokens, statistics: TileStatistics) -> Tensor:
    """Enter a tile into the statistics; its factor of the backward's products [m, v], not yet marked."""
    logits = projection.logits(tile)
    slope = projection.head.slope(logits)
    return projection.factor(_enter_tile(tile, logits, projection, tokens, statistics), slope)


def _enter_tile(
    tile: Tile, logits: Tensor, projection: Projection, tokens: Tokens, statistics: TileStatistics
) -> Tensor:
    """Enter a tile into the statistics; its exponentials, in place of the logits."""
    statistics.enter_logits(tile, logits, projection, tokens)
    exponentials = projection.exponentials_(logits, statistics.maxima[tile.number, tile.rows])
    statistics.enter_exponentials(tile, exponentials)
    return exponentials


@dataclass(frozen=True)
class _Marks:
    """Exponentials of a tile become a factor of the backward's products when the targets are marked in them."""

    projection: Projection
    tokens: Tokens
    softmax: Softmax
    maxima: Tensor  # [tiles, M]
    shares: Tensor  # [tiles, M]

    def put_(self, factor: Tensor, tile: Tile) -> None:
        """Put (E - 1/share) times the soft cap's slope at each row's first target, where the tile has it, in place."""
        head, logits = self.projection.head, self.softmax.first[tile.rows]
        maxima, shares = (each[tile.number, tile.rows] for each in (self.maxima, self.shares))
        value = torch.exp((logits - maxima) / head.temperature) - 1 / shares
        slope = head.slope(logits)
        value = value if slope is None else value * slope
        column, here = self.projection.local(self.tokens.first_target[tile.rows], tile.columns)
        current = factor.gather(1, column[:, None])[:, 0]
        factor.scatter_(1, column[:, None], torch.where(here, value.to(factor.dtype), current)[:, None])

    def recomputed(self, tile: Tile, room: Tensor) -> Tensor:
        """The factor of a tile that was not kept."""
        logits = self.projection.logits(tile, room)
        slope = self.projection.head.slope(logits)
        exponentials = self.projection.exponentials_(logits, self.maxima[tile.number, tile.rows])
        factor = self.projection.factor(exponentials, slope)
        self.put_(factor, tile)
        return factor


def _add_extra_tokens(d_hidden: Tensor, d_weight: WeightGradient | None, marks: _Marks, grad: Tensor) -> None:
    """Add g (onehot(target) - onehot(target of the row's first token)) for the extra tokens; few, [N - M, H] each."""
    projection, tokens, softmax = marks.projection, marks.tokens, marks.softmax
    rows = tokens.extra_row
    first_target = tokens.first_target[rows]
    # Equal targets cancel: exactly 0, not the difference of two roundings.
    added = grad[tokens.extra] * (tokens.extra_target != first_target)
    for target, logits, sign in ((tokens.extra_target, softmax.extra, 1), (first_target, softmax.first[rows], -1)):
        slope = projection.head.slope(logits)
        local, here = projection.local(target, slice(0, max(projection.valid, 1)))
        coefficient = (sign * added * here * (1 if slope is None else slope))[:, None]
        d_hidden.index_put_((rows,), coefficient * projection.rows(local), accumulate=True)
        if d_weight is not None:
            d_weight.add_rows(local, coefficient * projection.hidden[rows])
