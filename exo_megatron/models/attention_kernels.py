"""One attention pass over variable-length blocks, on the kernels of each device.

CUDA, half precision: one variable-length flash-attention launch a pass, whatever the number of blocks. Elsewhere: one
call for all blocks of equal shape, with the CPU flash kernels. Where flash attention cannot do what is asked (fp32 on
CUDA, a soft cap, a window shorter than the texts), one call for all blocks of equal shape with plain matrix products.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from exo_megatron.models.layout import GroupLayout
from exo_megatron.models.products import product
from exo_megatron.models.softcap import soft_cap_, soft_cap_slope

Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class ScoreRule:
    """How a score is made of a query and a key: scale * q.k, then c * tanh(score / c) if there is a soft cap c.

    window: a query at position p sees keys at positions above p - window only; None: no such limit.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None


@dataclass(frozen=True)
class AttentionPass:
    """Which queries see which keys: block i of the queries sees block i of the keys, all of it or causally.

    Blocks lie one after another. query_lengths, key_lengths: tokens of each block; query_bounds, key_bounds
    [blocks + 1] int32 on the device: the same, cumulative. A causal block has as many keys as queries.
    position_ids [S] int64: of the row's tokens, of which `query_rows` [N] and `key_rows` [Q] int64 are the queries and
    the keys (None: all). longest: tokens of the longest text, from the first key that a query sees to that query.
    """

    causal: bool
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    query_bounds: Tensor
    key_bounds: Tensor
    position_ids: Tensor
    query_rows: Tensor | None
    key_rows: Tensor | None
    longest: int

    @property
    def query_positions(self) -> Tensor:
        """Position of each query in its text, [N] int64."""
        return self.position_ids if self.query_rows is None else self.position_ids[self.query_rows]

    @property
    def key_positions(self) -> Tensor:
        """Position of each key in its text, [Q] int64."""
        return self.position_ids if self.key_rows is None else self.position_ids[self.key_rows]


def segment_pass(layout: GroupLayout) -> AttentionPass:
    """The first pass over a packed row: every segment (prompt, candidate, padding) causally over itself."""
    lengths, bounds = layout.segment_lengths, layout.segment_cu_seqlens
    return AttentionPass(True, lengths, lengths, bounds, bounds, layout.position_ids, None, None, max(lengths))


def prompt_pass(layout: GroupLayout) -> AttentionPass:
    """The second pass: the responses of each group, one block of queries, over their prompt."""
    return AttentionPass(
        causal=False,
        query_lengths=tuple(group.response_total for group in layout.groups),
        key_lengths=tuple(group.prompt_length for group in layout.groups),
        query_bounds=layout.response_cu_seqlens,
        key_bounds=layout.prompt_cu_seqlens,
        position_ids=layout.position_ids,
        query_rows=layout.response_rows,
        key_rows=layout.prompt_rows,
        longest=max(group.prompt_length + max(group.response_lengths, default=0) for group in layout.groups),
    )


class AttentionKernels(Protocol):
    """A pass and its backward. query and output [N, hq, d], key and value [Q, hkv, d], LSE [hq, N].

    LSE, the log-sum-exp of each query's scores, is fp32 (fp64 for fp64 inputs); of a query that sees no key it is
    -inf, and its output 0. The backward computes with whatever output and LSE it is given: those of the pass alone,
    or merged with those of other passes over other keys.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, which: AttentionPass, rule: ScoreRule
    ) -> tuple[Tensor, Tensor]:
        """Output and LSE."""
        ...

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        which: AttentionPass,
        rule: ScoreRule,
    ) -> Triple:
        """Gradients of query, key and value through this pass, given the gradient of the output."""
        ...


def kernels_for(query: Tensor, which: AttentionPass, rule: ScoreRule) -> AttentionKernels:
    """The kernels for this tensor's device and dtype that can do what the rule asks for in this pass."""
    if rule.softcap is not None or (rule.window is not None and which.longest > rule.window):
        return BatchedKernels(PlainKernel())
    if query.device.type != "cuda":
        return BatchedKernels(CpuFlashKernel())
    if query.dtype in (torch.bfloat16, torch.float16):
        return FlashVarlenKernels()
    return BatchedKernels(PlainKernel())


class FlashVarlenKernels:
    """ATen's variable-length flash attention, delimited by cumulative lengths on the device. See AttentionKernels."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, which: AttentionPass, rule: ScoreRule
    ) -> tuple[Tensor, Tensor]:
        """See AttentionKernels."""
        output, lse, _, _, _ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            which.query_bounds,
            which.key_bounds,
            max(which.query_lengths),
            max(which.key_lengths),
            0.0,
            which.causal,
            False,
            scale=rule.scale,
        )
        return output, lse

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        which: AttentionPass,
        rule: ScoreRule,
    ) -> Triple:
        """See AttentionKernels."""
        # The random state is read only when dropout is on.
        no_rng = torch.zeros(2, dtype=torch.uint64, device=query.device)
        unused = torch.empty(0, dtype=torch.uint64, device=query.device)
        d_query, d_key, d_value = torch.ops.aten._flash_attention_backward(
            grad,
            query,
            key,
            value,
            output,
            lse.contiguous(),
            which.query_bounds,
            which.key_bounds,
            max(which.query_lengths),
            max(which.key_lengths),
            0.0,
            which.causal,
            no_rng,
            unused,
            scale=rule.scale,
        )
        return d_query, d_key, d_value


class DenseKernel(Protocol):
    """Attention of blocks of equal shape: query [b, hq, q, d], key and value [b, hkv, k, d], LSE [b, hq, q].

    The rows of a block in the pass are `own` [b, q] (queries) and `seen` [b, k] (keys).
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        which: AttentionPass,
        own: Tensor,
        seen: Tensor,
        rule: ScoreRule,
    ) -> tuple[Tensor, Tensor]:
        """Output [b, hq, q, d] and LSE."""
        ...

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        which: AttentionPass,
        own: Tensor,
        seen: Tensor,
        rule: ScoreRule,
    ) -> Triple:
        """Gradients of query, key and value."""
        ...


@dataclass(frozen=True)
class BatchedKernels:
    """A pass from a dense kernel: blocks of equal shape share one call. See AttentionKernels."""

    dense: DenseKernel

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, which: AttentionPass, rule: ScoreRule
    ) -> tuple[Tensor, Tensor]:
        """See AttentionKernels."""
        lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        output = torch.empty_like(query)
        lse = query.new_empty(query.shape[1], query.shape[0], dtype=lse_dtype)
        for own, seen in _equal_blocks(which.query_lengths, which.key_lengths, query.device):
            q, k, v = _heads(query, own), _heads(key, seen), _heads(value, seen)
            block, block_lse = self.dense.forward(q, k, v, which, own, seen, rule)
            output[own] = block.transpose(1, 2)
            lse[:, own] = block_lse.transpose(0, 1)
        return output, lse

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        which: AttentionPass,
        rule: ScoreRule,
    ) -> Triple:
        """See AttentionKernels."""
        d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for own, seen in _equal_blocks(which.query_lengths, which.key_lengths, query.device):
            d_out, q, out = (_heads(tensor, own) for tensor in (grad, query, output))
            k, v = _heads(key, seen), _heads(value, seen)
            block_lse = lse[:, own].transpose(0, 1)
            dq, dk, dv = self.dense.backward(d_out, q, k, v, out, block_lse, which, own, seen, rule)
            d_query[own], d_key[seen], d_value[seen] = (part.transpose(1, 2) for part in (dq, dk, dv))
        return d_query, d_key, d_value


def _heads(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows [blocks, length] of [N, heads, d] -> [blocks, heads, length, d]."""
    return tensor[rows].transpose(1, 2)


@lru_cache(maxsize=64)
def _equal_blocks(
    query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], device: torch.device
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Query rows and key rows, each [blocks, length], of the blocks of each distinct shape."""
    starts: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    query = key = 0
    for shape in zip(query_lengths, key_lengths, strict=True):
        starts[shape].append((query, key))
        query, key = query + shape[0], key + shape[1]

    def rows(first: list[int], length: int) -> Tensor:
        return torch.tensor(first, device=device)[:, None] + torch.arange(length, device=device)

    return tuple(
        (rows([own for own, _ in first], shape[0]), rows([seen for _, seen in first], shape[1]))
        for shape, first in starts.items()
    )


class CpuFlashKernel:
    """ATen's flash attention for the CPU, fp32, fp64 and half precision; no soft cap, no window. See DenseKernel."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        which: AttentionPass,
        own: Tensor,
        seen: Tensor,
        rule: ScoreRule,
    ) -> tuple[Tensor, Tensor]:
        """See DenseKernel."""
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, which.causal, scale=rule.scale
        )
        return output, lse

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        which: AttentionPass,
        own: Tensor,
        seen: Tensor,
        rule: ScoreRule,
    ) -> Triple:
        """See DenseKernel."""
        d_query, d_key, d_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, output, lse.contiguous(), 0.0, which.causal, scale=rule.scale
        )
        return d_query, d_key, d_value


class PlainKernel:
    """Matrix products and a score for every pair of query and key in memory. Does all that a rule asks for.

    Half-precision operands are multiplied as such; products, scores, LSE and probabilities are fp32. See DenseKernel.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        which: AttentionPass,
        own: Tensor,
        seen: Tensor,
        rule: ScoreRule,
    ) -> tuple[Tensor, Tensor]:
        """See DenseKernel."""
        scores = _scores(query, key, rule).masked_fill_(_hidden(which, own, seen, rule), float("-inf"))
        lse = scores.logsumexp(-1)
        weights = scores.sub_(lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)).exp_()
        output = product(_by_group(weights.flatten(1, 2).to(value.dtype), key), value.flatten(0, 1))
        return output.view(query.shape).to(query.dtype), lse.flatten(1, 2)

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        which: AttentionPass,
        own: Tensor,
        seen: Tensor,
        rule: ScoreRule,
    ) -> Triple:
        """As flash attention computes it: P = exp(scores - LSE), delta = rowsum(dO * O). See DenseKernel."""
        keys, values, d_out = key.flatten(0, 1), value.flatten(0, 1), _by_group(grad, key)
        capped = _scores(query, key, rule)
        probabilities = (capped - lse.unflatten(1, (key.shape[1], -1)).unsqueeze(-1)).exp_()
        probabilities.masked_fill_(_hidden(which, own, seen, rule), 0.0)
        d_value = product(_by_group(probabilities.flatten(1, 2).to(value.dtype), key).transpose(1, 2), d_out)
        delta = (grad.to(lse.dtype) * output).sum(-1)
        d_weights = product(d_out, values.transpose(1, 2)).view(capped.shape) - delta.view(capped.shape[:-1])[..., None]
        d_scores = probabilities.mul_(d_weights).mul_(rule.scale)
        if rule.softcap is not None:
            d_scores.mul_(soft_cap_slope(capped, rule.softcap))
        d_scores = _by_group(d_scores.flatten(1, 2).to(query.dtype), key)
        d_query = product(d_scores, keys).view(query.shape)
        d_key = product(d_scores.transpose(1, 2), _by_group(query, key))
        return d_query.to(query.dtype), d_key.view(key.shape).to(key.dtype), d_value.view(key.shape).to(value.dtype)


def _by_group(heads: Tensor, key: Tensor) -> Tensor:
    """[b, hq, q, *] -> [b * hkv, hq / hkv * q, *]: the rows of the query heads that share a key head together."""
    return heads.reshape(key.shape[0] * key.shape[1], -1, heads.shape[-1])


def _scores(query: Tensor, key: Tensor, rule: ScoreRule) -> Tensor:
    """[b, hkv, hq / hkv, q, k] scaled and capped, fp32 (fp64 for fp64)."""
    scores = product(_by_group(query, key), key.flatten(0, 1).transpose(1, 2))
    scores = scores.view(key.shape[0], key.shape[1], -1, query.shape[2], key.shape[2])
    return soft_cap_(scores.mul_(rule.scale), rule.softcap)


def _hidden(which: AttentionPass, own: Tensor, seen: Tensor, rule: ScoreRule) -> Tensor:
    """[b, 1, 1, q, k]: which keys a query does not see: later ones if causal, and those that its window has left."""
    ago = which.query_positions[own].unsqueeze(-1) - which.key_positions[seen].unsqueeze(-2)
    hidden = ago < 0 if which.causal else torch.zeros_like(ago, dtype=torch.bool)
    if rule.window is not None:
        hidden = hidden | (ago >= rule.window)
    return hidden[:, None, None]
