"""One attention pass over variable-length blocks, on the kernels of each device.

CUDA, half precision: one variable-length flash-attention launch a pass, whatever the number of blocks. Elsewhere: one
call for all blocks of equal shape, with the CPU flash kernels or, for fp32 on CUDA (flash attention has no fp32),
with plain matrix products.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from exo_megatron.models.layout import GroupLayout

Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class AttentionPass:
    """Which queries see which keys: block i of the queries sees block i of the keys, all of it or causally.

    Blocks lie one after another. query_lengths, key_lengths: tokens of each block; query_bounds, key_bounds
    [blocks + 1] int32 on the device: the same, cumulative. A causal block has as many keys as queries.
    """

    causal: bool
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    query_bounds: Tensor
    key_bounds: Tensor


def segment_pass(layout: GroupLayout) -> AttentionPass:
    """The first pass over a packed row: every segment (prompt, candidate, padding) causally over itself."""
    lengths, bounds = layout.segment_lengths, layout.segment_cu_seqlens
    return AttentionPass(True, lengths, lengths, bounds, bounds)


class AttentionKernels(Protocol):
    """A pass and its backward. query and output [N, hq, d], key and value [Q, hkv, d], LSE [hq, N].

    LSE, the log-sum-exp of each query's scores, is fp32 (fp64 for fp64 inputs). The backward computes with whatever
    output and LSE it is given: those of the pass alone, or merged with those of other passes over other keys.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, which: AttentionPass, scale: float
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
        scale: float,
    ) -> Triple:
        """Gradients of query, key and value through this pass, given the gradient of the output."""
        ...


def kernels_for(query: Tensor) -> AttentionKernels:
    """The kernels for this tensor's device and dtype."""
    if query.device.type == "cuda":
        if query.dtype in (torch.bfloat16, torch.float16):
            return FlashVarlenKernels()
        return BatchedKernels(plain_forward, plain_backward)
    return BatchedKernels(_cpu_flash_forward, _cpu_flash_backward)


class FlashVarlenKernels:
    """ATen's variable-length flash attention, delimited by cumulative lengths on the device. See AttentionKernels."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, which: AttentionPass, scale: float
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
            scale=scale,
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
        scale: float,
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
            scale=scale,
        )
        return d_query, d_key, d_value


ForwardKernel = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
BackwardKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], Triple]


@dataclass(frozen=True)
class BatchedKernels:
    """A pass from a dense kernel on [blocks, heads, length, d]: blocks of equal shape share one call."""

    dense_forward: ForwardKernel
    dense_backward: BackwardKernel

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, which: AttentionPass, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See AttentionKernels."""
        lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        output = torch.empty_like(query)
        lse = query.new_empty(query.shape[1], query.shape[0], dtype=lse_dtype)
        for own, seen in _equal_blocks(which.query_lengths, which.key_lengths, query.device):
            q, k, v = _heads(query, own), _heads(key, seen), _heads(value, seen)
            block, block_lse = self.dense_forward(q, k, v, which.causal, scale)
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
        scale: float,
    ) -> Triple:
        """See AttentionKernels."""
        d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for own, seen in _equal_blocks(which.query_lengths, which.key_lengths, query.device):
            d_out, q, out = (_heads(tensor, own) for tensor in (grad, query, output))
            k, v = _heads(key, seen), _heads(value, seen)
            dq, dk, dv = self.dense_backward(d_out, q, k, v, out, lse[:, own].transpose(0, 1), which.causal, scale)
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


def _cpu_flash_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, scale=scale
    )
    return output, lse


def _cpu_flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, causal: bool, scale: float
) -> Triple:
    d_query, d_key, d_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, output, lse.contiguous(), 0.0, causal, scale=scale
    )
    return d_query, d_key, d_value


def _plain_scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    """[b, hkv, group, q, k]: scaled scores, heads of one key group together, -inf above the diagonal if causal."""
    grouped: Tensor = query.unflatten(1, (key.shape[1], -1))
    scores: Tensor = grouped @ key.unsqueeze(2).transpose(-1, -2) * scale
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores


def plain_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """A dense kernel from matrix products. query [b, hq, q, d], key and value [b, hkv, k, d] -> output, LSE."""
    scores = _plain_scores(query, key, causal, scale)
    lse = scores.logsumexp(-1)
    output = (scores - lse.unsqueeze(-1)).exp() @ value.unsqueeze(2)
    return output.flatten(1, 2), lse.flatten(1, 2)


def plain_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, causal: bool, scale: float
) -> Triple:
    """Its backward, as flash attention computes it: P = exp(scores - LSE), delta = rowsum(dO * O)."""
    groups = key.shape[1]
    probabilities = (_plain_scores(query, key, causal, scale) - lse.unflatten(1, (groups, -1)).unsqueeze(-1)).exp()
    d_out, out, q = (tensor.unflatten(1, (groups, -1)) for tensor in (grad, output, query))
    d_value = (probabilities.transpose(-1, -2) @ d_out).sum(2)
    delta = (d_out * out).sum(-1, keepdim=True)
    d_scores = probabilities * (d_out @ value.unsqueeze(2).transpose(-1, -2) - delta) * scale
    d_query = (d_scores @ key.unsqueeze(2)).flatten(1, 2)
    d_key = (d_scores.transpose(-1, -2) @ q).sum(2)
    return d_query, d_key, d_value
