"""The two attention passes on the kernels of each device.

CUDA, half precision: two variable-length flash-attention launches whatever the number of groups. Elsewhere: one
call for all segments of equal length and one per group for the second pass, with the CPU flash kernels or, for fp32
on CUDA (flash attention has no fp32), with plain matrix products.
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


class AttentionKernels(Protocol):
    """Both passes and their backwards.

    S row tokens, N response tokens, Q prompt tokens; query and output [.., hq, d], key and value [.., hkv, d],
    LSE [hq, ..] fp32 (fp64 for fp64 inputs). The backwards take the merged output and LSE.
    """

    def segments_forward(
        self, query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Causal attention inside every segment of the row: [S] -> output [S, hq, d], LSE [hq, S]."""
        ...

    def segments_backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        layout: GroupLayout,
        scale: float,
    ) -> Triple:
        """Gradients of query, key and value through the first pass."""
        ...

    def prompts_forward(
        self, query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Responses [N] over their own prompt [Q]: output [N, hq, d], LSE [hq, N]."""
        ...

    def prompts_backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        layout: GroupLayout,
        scale: float,
    ) -> Triple:
        """Gradients of query [N], key [Q] and value [Q] through the second pass."""
        ...


def kernels_for(query: Tensor) -> AttentionKernels:
    """The kernels for this tensor's device and dtype."""
    if query.device.type == "cuda":
        if query.dtype in (torch.bfloat16, torch.float16):
            return FlashVarlenKernels()
        return BatchedKernels(_plain_forward, _plain_backward)
    return BatchedKernels(_cpu_flash_forward, _cpu_flash_backward)


class FlashVarlenKernels:
    """ATen's variable-length flash attention: one launch a pass, delimited by cumulative lengths on the device."""

    def segments_forward(
        self, query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See AttentionKernels."""
        cu, longest = layout.segment_cu_seqlens, layout.max_seqlen_q
        return _varlen_forward(query, key, value, cu, cu, longest, longest, True, scale)

    def segments_backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        layout: GroupLayout,
        scale: float,
    ) -> Triple:
        """See AttentionKernels."""
        cu, longest = layout.segment_cu_seqlens, layout.max_seqlen_q
        return _varlen_backward(grad, query, key, value, output, lse, cu, cu, longest, longest, True, scale)

    def prompts_forward(
        self, query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See AttentionKernels."""
        cu_q, cu_k, max_q, max_k = _prompt_pass_lengths(layout)
        return _varlen_forward(query, key, value, cu_q, cu_k, max_q, max_k, False, scale)

    def prompts_backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        layout: GroupLayout,
        scale: float,
    ) -> Triple:
        """See AttentionKernels."""
        cu_q, cu_k, max_q, max_k = _prompt_pass_lengths(layout)
        return _varlen_backward(grad, query, key, value, output, lse, cu_q, cu_k, max_q, max_k, False, scale)


def _prompt_pass_lengths(layout: GroupLayout) -> tuple[Tensor, Tensor, int, int]:
    longest_response = max(group.response_total for group in layout.groups)
    longest_prompt = max(group.prompt_length for group in layout.groups)
    return layout.response_cu_seqlens, layout.prompt_cu_seqlens, longest_response, longest_prompt


def _varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    output, lse, _, _, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale
    )
    return output, lse


def _varlen_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
) -> Triple:
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
        cu_q,
        cu_k,
        max_q,
        max_k,
        0.0,
        causal,
        no_rng,
        unused,
        scale=scale,
    )
    return d_query, d_key, d_value


ForwardKernel = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
BackwardKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], Triple]


@dataclass(frozen=True)
class BatchedKernels:
    """Both passes from a dense kernel on [batch, heads, length, d].

    Segments of equal length share one call; the second pass makes one call per group, whose K candidates are one
    block of queries (they lie next to each other).
    """

    forward: ForwardKernel
    backward: BackwardKernel

    def segments_forward(
        self, query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See AttentionKernels."""
        output, lse = _empty_result(query)
        for rows in _equal_segments(layout.segment_lengths, query.device):
            out, part = self.forward(_heads(query[rows]), _heads(key[rows]), _heads(value[rows]), True, scale)
            output[rows] = out.transpose(1, 2)
            lse[:, rows] = part.transpose(0, 1)
        return output, lse

    def segments_backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        layout: GroupLayout,
        scale: float,
    ) -> Triple:
        """See AttentionKernels."""
        result = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for rows in _equal_segments(layout.segment_lengths, query.device):
            d_out, q, k, v, out = (_heads(tensor[rows]) for tensor in (grad, query, key, value, output))
            parts = self.backward(d_out, q, k, v, out, lse[:, rows].transpose(0, 1), True, scale)
            for whole, part in zip(result, parts, strict=True):
                whole[rows] = part.transpose(1, 2)
        return result

    def prompts_forward(
        self, query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See AttentionKernels."""
        output, lse = _empty_result(query)
        for own, prompt in _group_slices(layout):
            q, k, v = (_heads(tensor[None]) for tensor in (query[own], key[prompt], value[prompt]))
            out, part = self.forward(q, k, v, False, scale)
            output[own] = out[0].transpose(0, 1)
            lse[:, own] = part[0]
        return output, lse

    def prompts_backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        layout: GroupLayout,
        scale: float,
    ) -> Triple:
        """See AttentionKernels."""
        result = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for own, prompt in _group_slices(layout):
            slices = (grad[own], query[own], key[prompt], value[prompt], output[own])
            d_out, q, k, v, out = (_heads(tensor[None]) for tensor in slices)
            parts = self.backward(d_out, q, k, v, out, lse[None, :, own], False, scale)
            for whole, part, rows in zip(result, parts, (own, prompt, prompt), strict=True):
                whole[rows] = part[0].transpose(0, 1)
        return result


def _heads(tensor: Tensor) -> Tensor:
    """[batch, length, heads, d] -> [batch, heads, length, d]."""
    return tensor.transpose(1, 2)


def _empty_result(query: Tensor) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0], dtype=lse_dtype)


@lru_cache(maxsize=64)
def _equal_segments(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Row indices [segments, length] of the segments of each distinct length."""
    starts: dict[int, list[int]] = defaultdict(list)
    position = 0
    for length in lengths:
        starts[length].append(position)
        position += length
    return tuple(
        torch.tensor(first, device=device)[:, None] + torch.arange(length, device=device)
        for length, first in starts.items()
    )


def _group_slices(layout: GroupLayout) -> list[tuple[slice, slice]]:
    """For each group, its rows among the N response rows and among the Q prompt rows."""
    slices: list[tuple[slice, slice]] = []
    response = prompt = 0
    for group in layout.groups:
        slices.append((slice(response, response + group.response_total), slice(prompt, prompt + group.prompt_length)))
        response += group.response_total
        prompt += group.prompt_length
    return slices


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


def _plain_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    scores = _plain_scores(query, key, causal, scale)
    lse = scores.logsumexp(-1)
    output = (scores - lse.unsqueeze(-1)).exp() @ value.unsqueeze(2)
    return output.flatten(1, 2), lse.flatten(1, 2)


def _plain_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, causal: bool, scale: float
) -> Triple:
    groups = key.shape[1]
    probabilities = (_plain_scores(query, key, causal, scale) - lse.unflatten(1, (groups, -1)).unsqueeze(-1)).exp()
    d_out, out, q = (tensor.unflatten(1, (groups, -1)) for tensor in (grad, output, query))
    d_value = (probabilities.transpose(-1, -2) @ d_out).sum(2)
    delta = (d_out * out).sum(-1, keepdim=True)
    d_scores = probabilities * (d_out @ value.unsqueeze(2).transpose(-1, -2) - delta) * scale
    d_query = (d_scores @ key.unsqueeze(2)).flatten(1, 2)
    d_key = (d_scores.transpose(-1, -2) @ q).sum(2)
    return d_query, d_key, d_value
