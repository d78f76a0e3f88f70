"""Attention over blocks of equal shape, on dense tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from exo_megatron.models.attention.passes import QKV, Attended, ScoreRule
from exo_megatron.models.numerics import product, soft_cap_, soft_cap_slope

PIECE = 2**25
"""Scores that PlainKernel has in memory at once: 128 MiB in fp32, more in the backward pass."""


@dataclass(frozen=True)
class Blocks:
    """b blocks of equal shape, with text positions of their queries [b, q] and keys [b, k]."""

    causal: bool
    query_positions: Tensor
    key_positions: Tensor


class DenseKernel(Protocol):
    """Attention of b blocks.

    Query and output are [b, hq, q, d], key and value [b, hkv, k, d], LSE [b, hq, q].
    """

    def forward(self, inputs: QKV, blocks: Blocks, rule: ScoreRule) -> Attended:
        """Compute output and LSE."""
        ...

    def backward(self, grad: Tensor, inputs: QKV, attended: Attended, blocks: Blocks, rule: ScoreRule) -> QKV:
        """Compute the gradients of query, key and value."""
        ...


class CpuFlashKernel:
    """ATen's flash attention for the CPU, of any float dtype, without soft cap and window.

    See DenseKernel.
    """

    def forward(self, inputs: QKV, blocks: Blocks, rule: ScoreRule) -> Attended:
        """See DenseKernel."""
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *inputs, 0.0, blocks.causal, scale=rule.scale
        )
        return Attended(output, lse)

    def backward(self, grad: Tensor, inputs: QKV, attended: Attended, blocks: Blocks, rule: ScoreRule) -> QKV:
        """See DenseKernel."""
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *inputs, attended.output, attended.lse.contiguous(), 0.0, blocks.causal, scale=rule.scale
        )
        return QKV(*gradients)


class PlainKernel:
    """Attention by matrix products, one piece of the queries at a time over the keys it may see.

    Supports everything that a rule can ask for. At most about PIECE scores are in memory, and a
    window makes the work proportional to its length. Half-precision operands are multiplied as
    such; products, scores, LSE and probabilities are fp32. See DenseKernel.
    """

    def forward(self, inputs: QKV, blocks: Blocks, rule: ScoreRule) -> Attended:
        """See DenseKernel."""
        may_see_none = rule.window is not None and not blocks.causal
        parts = [
            _forward_piece(_cut(inputs, queries, keys), _hidden(blocks, queries, keys, rule), rule, may_see_none)
            for queries, keys in _pieces(inputs, blocks.causal, rule)
        ]
        return parts[0] if len(parts) == 1 else Attended(*(torch.cat(each, dim=2) for each in zip(*parts, strict=True)))

    def backward(self, grad: Tensor, inputs: QKV, attended: Attended, blocks: Blocks, rule: ScoreRule) -> QKV:
        """Compute gradients as flash attention does: P = exp(scores - LSE), delta = rowsum(dO * O).

        See DenseKernel.
        """
        query, key, value = inputs
        output, lse = attended
        delta = (grad.to(lse.dtype) * output).sum(-1)
        pieces = list(_pieces(inputs, blocks.causal, rule))
        gradients = (
            _backward_piece(
                (grad[:, :, queries], lse[:, :, queries], delta[:, :, queries]),
                _cut(inputs, queries, keys),
                _hidden(blocks, queries, keys, rule),
                rule,
            )
            for queries, keys in pieces
        )
        if len(pieces) == 1 and pieces[0][1].start == 0:
            dq, dk, dv = next(gradients)
            return QKV(dq, dk.to(key.dtype), dv.to(value.dtype))
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.zeros(each.shape, dtype=lse.dtype, device=each.device) for each in (key, value))
        for (queries, keys), (dq, dk, dv) in zip(pieces, gradients, strict=True):
            d_query[:, :, queries] = dq
            d_key[:, :, keys] += dk
            d_value[:, :, keys] += dv
        return QKV(d_query, d_key.to(key.dtype), d_value.to(value.dtype))


def _cut(inputs: QKV, queries: slice, keys: slice) -> QKV:
    return QKV(inputs.query[:, :, queries], inputs.key[:, :, keys], inputs.value[:, :, keys])


def _pieces(inputs: QKV, causal: bool, rule: ScoreRule) -> Iterator[tuple[slice, slice]]:
    """Yield slices of the queries and, for each, of the keys that any of its queries may see."""
    (blocks, heads, count, _), key_count = inputs.query.shape, inputs.key.shape[2]
    widest = key_count if rule.window is None else min(key_count, 2 * rule.window)
    size = max(1, PIECE // (blocks * heads * widest))
    if rule.window is not None and causal:
        size = min(size, rule.window)
    for start in range(0, count, size):
        stop = min(start + size, count)
        first = 0
        if rule.window is not None:
            # Not causal: the keys are a prompt, and the first query is the first token after it.
            first = max(0, (start if causal else key_count) - rule.window + 1)
        yield slice(start, stop), slice(first, stop if causal else key_count)


def _hidden(blocks: Blocks, queries: slice, keys: slice, rule: ScoreRule) -> Tensor | None:
    """Mark the keys that a query does not see, [b, 1, 1, q, k] bool: later ones if causal, and
    those outside of its window. None: it sees all.
    """
    query, key = blocks.query_positions[:, queries].unsqueeze(-1), blocks.key_positions[:, keys].unsqueeze(-2)
    hidden = key > query if blocks.causal else None
    if rule.window is not None:
        gone = key <= query - rule.window
        hidden = gone if hidden is None else hidden.logical_or_(gone)
    return None if hidden is None else hidden[:, None, None]


def _forward_piece(inputs: QKV, hidden: Tensor | None, rule: ScoreRule, may_see_none: bool) -> Attended:
    query, key, value = inputs
    scores = _scores(query, key, rule)
    if hidden is not None:
        scores.masked_fill_(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    finite = lse.masked_fill(lse.isneginf(), 0.0) if may_see_none else lse
    weights = scores.sub_(finite.unsqueeze(-1)).exp_()
    output = product(_by_group(weights.flatten(1, 2).to(value.dtype), key), value.flatten(0, 1))
    return Attended(output.view(query.shape).to(query.dtype), lse.flatten(1, 2))


def _backward_piece(
    of_queries: tuple[Tensor, Tensor, Tensor], inputs: QKV, hidden: Tensor | None, rule: ScoreRule
) -> QKV:
    """Compute a piece's gradients, given that of its output, its LSE and delta.

    That of its queries is in their dtype; its shares of those of key and value are in that of LSE.
    """
    (grad, lse, delta), (query, key, value) = of_queries, inputs
    keys, values, d_out = key.flatten(0, 1), value.flatten(0, 1), _by_group(grad, key)
    capped = _scores(query, key, rule)
    probabilities = (capped - lse.reshape(capped.shape[:-1]).unsqueeze(-1)).exp_()
    if hidden is not None:
        probabilities.masked_fill_(hidden, 0.0)
    d_value = product(_by_group(probabilities.flatten(1, 2).to(value.dtype), key).transpose(1, 2), d_out)
    d_weights = product(d_out, values.transpose(1, 2)).view(capped.shape) - delta.reshape(capped.shape[:-1])[..., None]
    d_scores = probabilities.mul_(d_weights).mul_(rule.scale)
    if rule.softcap is not None:
        d_scores.mul_(soft_cap_slope(capped, rule.softcap))
    d_scores = _by_group(d_scores.flatten(1, 2).to(query.dtype), key)
    d_query = product(d_scores, keys).view(query.shape).to(query.dtype)
    d_key = product(d_scores.transpose(1, 2), _by_group(query, key))
    return QKV(d_query, d_key.view(key.shape), d_value.view(key.shape))


def _by_group(heads: Tensor, key: Tensor) -> Tensor:
    """Reshape [b, hq, q, *] to [b * hkv, hq / hkv * q, *], by query heads that share a key head."""
    return heads.reshape(key.shape[0] * key.shape[1], -1, heads.shape[-1])


def _scores(query: Tensor, key: Tensor, rule: ScoreRule) -> Tensor:
    """Compute scaled and capped scores [b, hkv, hq / hkv, q, k], fp32 (fp64 for fp64)."""
    scores = product(_by_group(query, key), key.flatten(0, 1).transpose(1, 2))
    scores = scores.view(key.shape[0], key.shape[1], -1, query.shape[2], key.shape[2])
    return soft_cap_(scores.mul_(rule.scale), rule.softcap)
