"""Log-probs of candidate tokens from hidden states, on vocabulary shards, in fp32, tile by tile.

Letters: M predicting positions, N candidate tokens (N >= M: the K first tokens of a group share one
position), H hidden, V vocabulary, Vp padded vocabulary, t tensor-parallel size, m positions and v
columns of a tile, x logits before the temperature tau.

A tile's logits become E = exp((x - max) / tau) in place, where max is the position's maximum in the
tile; its softmax on the tile is E times one number per position, `share`. With R the sum of a
position's token gradients and T its first token's target,

    d x = -R/tau share (E - onehot(T) / share)  +  the terms of the position's other tokens,
          g/tau (onehot(target) - onehot(T)) each

so the forward pass puts E - 1/share at the target, and the backward pass needs no elementwise work
on the logits: R, share and tau scale the [M, H] factors of the two products. softmax - onehot is
formed in fp32 even where E is multiplied in half precision, and nothing is divided by R, which is 0
for positions whose K tokens have an objective's coefficients.

Tiles kept from the forward pass cost 4 M H V/t FLOPs in the backward pass, the others 6 M H V/t.
The only communication is one all-gather of 2 M + N floats per rank. Forward and backward never wait
for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from exo_megatron.logprobs.softmax import (
    Head,
    Projection,
    Softmax,
    Tile,
    TileStatistics,
    Tiling,
    Tokens,
    VocabShard,
)
from exo_megatron.logprobs.weight_gradient import WeightGradient
from exo_megatron.models.layouts.groups import GroupLayout
from exo_megatron.models.numerics import product


def sharded_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_predictor: Tensor,
    token_target: Tensor,
    shard: VocabShard,
    *,
    temperature: float,
    tiling: Tiling,
    softcap: float | None = None,
) -> Tensor:
    """Compute log softmax(hidden W^T / temperature)[target] for N candidate tokens; differentiable.

    Collectives: one all-gather of 2 M + N elements over shard.group, in the forward pass only. The
    gradient of `hidden` is this rank's partial sum over its vocabulary; the caller's region
    function reduces it over the group (models/policy.py). The inputs are not modified, except that
    the gradient of a weight with megatron-core's `main_grad` is added to that buffer.

    Args:
        hidden: [M, H], complete on every rank.
        weight: [Vp/t, H], this rank's rows.
        token_predictor: [N] int64, non-decreasing index into hidden, in which every index occurs.
        token_target: [N] int64 vocabulary ids.
        shard: this rank's part of the vocabulary.
        temperature: logits are divided by it.
        tiling: plan of the tiles, see `plan_tiles`.
        softcap: logits become softcap * tanh(logits / softcap) before the division; None:
            unchanged.

    Returns:
        [N] fp32 (fp64 for fp64 weights), in nats, equal on all ranks.
    """
    apply: Callable[..., Tensor] = _ShardedLogProbs.apply
    differentiated = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    tiling = tiling if differentiated else replace(tiling, kept=0)
    return apply(hidden, weight, token_predictor, token_target, Head(shard, temperature, softcap), tiling)


class _ShardedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        token_predictor: Tensor,
        token_target: Tensor,
        head: Head,
        tiling: Tiling,
    ) -> Tensor:
        projection = Projection(hidden, weight, head)
        tokens = Tokens.of(token_predictor, token_target, hidden.shape[0])
        tiles = projection.tiles(tiling)
        statistics = TileStatistics.empty(projection, tokens, tiles[-1].number + 1 if tiles else 0)
        kept = [_forward_tile(tile, projection, tokens, statistics) for tile in tiles[: tiling.kept]]
        buffer = projection.buffer(tiles[len(kept) :])
        for tile in tiles[len(kept) :]:
            _enter_tile(tile, projection.logits(tile, buffer), projection, tokens, statistics)
        softmax = statistics.over_ranks(head)
        factors = _Factors(projection, tokens, softmax, statistics.maxima, softmax.shares(statistics.maxima, head))
        for factor, tile in zip(kept, tiles, strict=False):
            factors.subtract_onehot_(factor, tile)
        ctx.save_for_backward(hidden, weight, factors.maxima, factors.shares, *kept)
        ctx.head, ctx.tiling, ctx.tokens, ctx.softmax = head, tiling, tokens, softmax
        return softmax.logprobs(tokens, head)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        hidden, weight, maxima, shares, *kept = ctx.saved_tensors
        projection = Projection(hidden, weight, ctx.head)
        factors = _Factors(projection, ctx.tokens, ctx.softmax, maxima, shares)
        grad = grads[0].to(projection.dtype) / ctx.head.temperature
        position_grad = grad.new_zeros(hidden.shape[0]).index_put_((ctx.tokens.position,), grad, accumulate=True)
        d_hidden = torch.zeros(hidden.shape, dtype=projection.dtype, device=hidden.device)
        d_weight = WeightGradient(weight, projection.dtype) if ctx.needs_input_grad[1] else None
        tiles = projection.tiles(ctx.tiling)
        buffer = projection.buffer(tiles[len(kept) :])
        products = torch.empty_like(d_hidden[tiles[0].positions]) if tiles else d_hidden
        for index, tile in enumerate(tiles):
            factor = kept[index] if index < len(kept) else factors.recompute(tile, buffer)
            out = products[: factor.shape[0]]
            scale = (-position_grad[tile.positions] * shares[tile.number, tile.positions])[:, None]
            d_hidden[tile.positions].addcmul_(product(factor, projection.weight(tile), out=out), scale)
            if d_weight is not None:
                right = torch.mul(projection.hidden[tile.positions], scale, out=out).to(factor.dtype)
                d_weight.add(tile.columns, factor.t(), right, first=tile.positions.start == 0)
        if d_weight is not None:
            d_weight.clear_from(projection.valid)
        _add_extra_tokens(d_hidden, d_weight, factors, grad)
        weight_grad = None if d_weight is None else d_weight.for_autograd()
        return d_hidden.to(hidden.dtype), weight_grad, None, None, None, None


def _forward_tile(tile: Tile, projection: Projection, tokens: Tokens, statistics: TileStatistics) -> Tensor:
    """Enter a tile into the statistics and return its factor of the backward's products [m, v].

    The targets are not yet subtracted from it.
    """
    logits = projection.logits(tile)
    slope = projection.head.slope(logits)
    return projection.factor(_enter_tile(tile, logits, projection, tokens, statistics), slope)


def _enter_tile(
    tile: Tile, logits: Tensor, projection: Projection, tokens: Tokens, statistics: TileStatistics
) -> Tensor:
    """Enter a tile into the statistics and return its exponentials, in place of the logits."""
    statistics.enter_logits(tile, logits, projection, tokens)
    exponentials = projection.exponentials_(logits, statistics.maxima[tile.number, tile.positions])
    statistics.enter_exponentials(tile, exponentials)
    return exponentials


@dataclass(frozen=True)
class _Factors:
    """Factors of the backward's products: exponentials of tiles without the targets' one-hot."""

    projection: Projection
    tokens: Tokens
    softmax: Softmax
    maxima: Tensor  # [tiles, M]
    shares: Tensor  # [tiles, M]

    def subtract_onehot_(self, factor: Tensor, tile: Tile) -> None:
        """Put (E - 1/share) times the soft cap's slope at each first target, in place."""
        head, logits = self.projection.head, self.softmax.first[tile.positions]
        maxima, shares = (each[tile.number, tile.positions] for each in (self.maxima, self.shares))
        value = torch.exp((logits - maxima) / head.temperature) - 1 / shares
        slope = head.slope(logits)
        value = value if slope is None else value * slope
        column, here = self.projection.local(self.tokens.first_target[tile.positions], tile.columns)
        current = factor.gather(1, column[:, None])[:, 0]
        factor.scatter_(1, column[:, None], torch.where(here, value.to(factor.dtype), current)[:, None])

    def recompute(self, tile: Tile, buffer: Tensor) -> Tensor:
        """Compute the factor of a tile that was not kept."""
        logits = self.projection.logits(tile, buffer)
        slope = self.projection.head.slope(logits)
        exponentials = self.projection.exponentials_(logits, self.maxima[tile.number, tile.positions])
        factor = self.projection.factor(exponentials, slope)
        self.subtract_onehot_(factor, tile)
        return factor


def _add_extra_tokens(d_hidden: Tensor, d_weight: WeightGradient | None, factors: _Factors, grad: Tensor) -> None:
    """Add g (onehot(target) - onehot(target of the position's first token)) for the extra tokens.

    These are few: [N - M, H] for each of the two terms.
    """
    projection, tokens, softmax = factors.projection, factors.tokens, factors.softmax
    positions = tokens.extra_position
    first_target = tokens.first_target[positions]
    # Equal targets cancel: exactly 0, not the difference of two roundings.
    added = grad[tokens.extra] * (tokens.extra_target != first_target)
    for target, logits, sign in ((tokens.extra_target, softmax.extra, 1), (first_target, softmax.first[positions], -1)):
        slope = projection.head.slope(logits)
        local, here = projection.local(target, slice(0, max(projection.valid, 1)))
        coefficient = (sign * added * here * (1 if slope is None else slope))[:, None]
        d_hidden.index_put_((positions,), coefficient * projection.weight_at(local), accumulate=True)
        if d_weight is not None:
            d_weight.add_at(local, coefficient * projection.hidden[positions])


def sequence_logprobs(token_logps: Tensor, layout: GroupLayout) -> Tensor:
    """Compute log pi(y_k | x) of each candidate, [C] fp64, in nats, from token log-probs [N].

    fp64, because log-ratios are small differences of sums of several hundred nats. Each candidate's
    sum runs over its own tokens in natural order, so it does not depend on the rest of the
    micro-batch.
    """
    if token_logps.shape[0] == 0:
        return token_logps.double()
    natural = token_logps.new_zeros(token_logps.shape).index_copy(0, layout.token_order, token_logps)
    return torch.segment_reduce(natural.double(), "sum", lengths=layout.candidate_lengths, unsafe=True)
