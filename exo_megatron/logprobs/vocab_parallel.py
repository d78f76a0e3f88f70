"""Log-probs of response tokens from hidden states, on vocabulary shards, in fp32, in chunks.

Letters: M predicting rows, N response tokens (N >= M: K first tokens share one row), H hidden, V vocabulary,
Vp padded vocabulary, t tensor-parallel size. Logits exist for `chunk_rows` rows at a time and are recomputed in the
backward pass; the only communication is one all-gather of M + N floats per rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

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


def sharded_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_row: Tensor,
    token_target: Tensor,
    shard: VocabShard,
    *,
    temperature: float,
    chunk_rows: int,
    softcap: float | None = None,
) -> Tensor:
    """log softmax(hidden W^T / temperature)[target] for N response tokens, differentiable.

    softcap: logits become softcap * tanh(logits / softcap) before the temperature divides them.

    hidden [M, H], complete on every rank; weight [Vp/t, H], this rank's rows; token_row [N] int64 non-decreasing
    index into hidden; token_target [N] int64. Returns [N] fp32 (fp64 for fp64 hidden), equal on all ranks.

    Collectives: one all-gather of M + N elements over shard.group, forward only. The gradient of `hidden` is this
    rank's partial sum over its vocabulary; the caller's region function reduces it over the group (models/policy.py).
    The inputs are not modified.
    """
    apply: Callable[..., Tensor] = _ShardedLogProbs.apply
    head = _Head(shard, temperature, softcap)
    return apply(hidden, weight, token_row, token_target, head, chunk_rows)


class _ShardedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        token_row: Tensor,
        token_target: Tensor,
        head: _Head,
        chunk_rows: int,
    ) -> Tensor:
        projection = _Projection(weight, head)
        lse = hidden.new_empty(hidden.shape[0], dtype=projection.dtype)
        target_logit = hidden.new_zeros(token_row.shape[0], dtype=projection.dtype)
        bounds = _chunk_bounds(token_row, hidden.shape[0], chunk_rows)
        for rows, tokens in bounds:
            logits = projection.logits(hidden[rows])
            lse[rows] = logits.logsumexp(dim=-1)
            target_logit[tokens] = projection.pick(logits, token_row[tokens] - rows.start, token_target[tokens])
        lse, target_logit = _combine(lse, target_logit, head.shard)
        ctx.save_for_backward(hidden, weight, token_row, token_target, lse)
        ctx.head, ctx.bounds = head, bounds
        return target_logit - lse[token_row]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden, weight, token_row, token_target, lse = ctx.saved_tensors
        projection = _Projection(weight, ctx.head)
        grad = grads[0].to(projection.dtype)
        row_grad = torch.zeros_like(lse).index_add_(0, token_row, grad)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, dtype=projection.dtype, device=weight.device)
        for rows, tokens in ctx.bounds:
            # d logits = grad (onehot - softmax), summed over the tokens that a row predicts.
            logits = projection.logits(hidden[rows])
            slope = projection.slope(logits)
            d_logits = logits.sub_(lse[rows, None]).exp_().mul_(-row_grad[rows, None])
            projection.add_at(d_logits, token_row[tokens] - rows.start, token_target[tokens], grad[tokens])
            d_logits.mul_(slope)
            d_hidden[rows] = projection.times_weight(d_logits).to(hidden.dtype)
            projection.accumulate(d_weight, d_logits, hidden[rows])
        return d_hidden, d_weight.to(weight.dtype), None, None, None, None


@dataclass(frozen=True)
class _Head:
    """What turns products of hidden states and vocabulary rows into the logits of a softmax."""

    shard: VocabShard
    temperature: float
    softcap: float | None


class _Projection:
    """The vocabulary projection of one shard, accumulated in fp32 (fp64 for fp64); the weight is cast at most once."""

    def __init__(self, weight: Tensor, head: _Head) -> None:
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.weight = multiplicand(weight.detach())
        self.temperature = head.temperature
        self.softcap = head.softcap
        self.start = head.shard.start(weight.shape[0])
        self.valid = head.shard.valid(weight.shape[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, H] -> [rows, Vp/t] capped logits over the temperature; padding has -inf."""
        logits = soft_cap_(product(hidden.to(self.weight.dtype), self.weight.t()), self.softcap)
        logits.div_(self.temperature)
        logits[:, self.valid :] = float("-inf")
        return logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of `logits` with respect to the products, [rows, Vp/t] (a number without a soft cap)."""
        if self.softcap is None:
            return 1 / self.temperature
        slope = soft_cap_slope(logits * self.temperature, self.softcap).div_(self.temperature)
        slope[:, self.valid :] = 0.0
        return slope

    def times_weight(self, d_logits: Tensor) -> Tensor:
        """[rows, Vp/t] -> [rows, H] in fp32: the gradient of the hidden rows."""
        return product(d_logits.to(self.weight.dtype), self.weight)

    def accumulate(self, d_weight: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
        """Add d_logits^T hidden to d_weight [Vp/t, H], in place."""
        left, right = d_logits.t().to(self.weight.dtype), hidden.to(self.weight.dtype)
        if self.weight.dtype == d_weight.dtype:
            d_weight.addmm_(left, right)
        else:
            d_weight.add_(product(left, right))

    def pick(self, logits: Tensor, row: Tensor, target: Tensor) -> Tensor:
        """Logit of each token's target where this shard holds it, 0 elsewhere (the ranks' sum is the logit)."""
        local = target - self.start
        here = (local >= 0) & (local < self.valid)
        return torch.where(here, logits[row, local.clamp(0, logits.shape[1] - 1)], 0.0)

    def add_at(self, d_logits: Tensor, row: Tensor, target: Tensor, grad: Tensor) -> None:
        """Add each token's gradient at its target, in place, where this shard holds it."""
        local = target - self.start
        here = (local >= 0) & (local < self.valid)
        # A row's K first tokens may share a target, so contributions accumulate.
        d_logits.index_put_((row, local.clamp(0, d_logits.shape[1] - 1)), grad * here, accumulate=True)


def _chunk_bounds(token_row: Tensor, rows: int, chunk_rows: int) -> list[tuple[slice, slice]]:
    """Slices of rows and of the tokens that they predict, chunk by chunk."""
    if rows == 0:
        return []
    starts = list(range(0, rows, chunk_rows))
    if len(starts) == 1:
        return [(slice(0, rows), slice(0, token_row.shape[0]))]
    edges = torch.searchsorted(token_row, torch.tensor([*starts, rows], device=token_row.device)).tolist()
    return list(_slices(starts, rows, edges))


def _slices(starts: list[int], rows: int, edges: list[int]) -> Iterator[tuple[slice, slice]]:
    for i, start in enumerate(starts):
        stop = starts[i + 1] if i + 1 < len(starts) else rows
        yield slice(start, stop), slice(edges[i], edges[i + 1])


def _combine(lse: Tensor, target_logit: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """All ranks' LSE and target logits into the global ones, by one all-gather over the tensor group."""
    if shard.ranks == 1:
        return lse, target_logit
    local = torch.cat((lse, target_logit))
    gathered = local.new_empty(shard.ranks * local.shape[0])
    dist.all_gather_into_tensor(gathered, local, group=shard.group)
    parts = gathered.view(shard.ranks, -1)
    return parts[:, : lse.shape[0]].logsumexp(dim=0), parts[:, lse.shape[0] :].sum(dim=0)
