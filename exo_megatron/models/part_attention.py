"""Core attention of a part of a group: causal over its own candidates, and over the stored prompt; merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from exo_megatron.models.attention_kernels import kernels_for, merge
from exo_megatron.models.attention_pass import ScoreRule, segment_pass
from exo_megatron.models.shared_prompt import PartLayout


def part_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PartLayout, layer_number: int, rule: ScoreRule
) -> Tensor:
    """query [S, hq, d], key and value [S, hkv, d] of the part's row -> [S, hq, d]; differentiable.

    The backward adds the gradients of the prompt's keys and values to `layout.shared`.
    """
    apply: Callable[..., Tensor] = _PartAttention.apply
    return apply(query, key, value, layout, layer_number, rule)


class _PartAttention(torch.autograd.Function):
    """The two passes of group attention (models/attention.py), the second over keys of another pass."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: PartLayout, layer_number: int, rule: ScoreRule
    ) -> Tensor:
        segments, prompt = segment_pass(layout.row), layout.prompt
        output, lse = kernels_for(query, segments, rule).forward(query, key, value, segments, rule)
        if prompt is not None:
            rows = slice(0, prompt.query_lengths[0])
            keys, values = layout.shared.keys[layer_number].value, layout.shared.values[layer_number].value
            seen = kernels_for(query, prompt, rule).forward(query[rows], keys, values, prompt, rule)
            merge(output, lse, rows, *seen)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.layout, ctx.layer_number, ctx.rule = layout, layer_number, rule
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, output, lse = ctx.saved_tensors
        layout: PartLayout = ctx.layout
        rule: ScoreRule = ctx.rule
        grad = grads[0].contiguous()
        segments, prompt = segment_pass(layout.row), layout.prompt
        kernels = kernels_for(query, segments, rule)
        d_query, d_key, d_value = kernels.backward(grad, query, key, value, output, lse, segments, rule)
        if prompt is not None:
            rows = slice(0, prompt.query_lengths[0])
            keys, values = layout.shared.keys[ctx.layer_number], layout.shared.values[ctx.layer_number]
            own = (grad[rows], query[rows], keys.value, values.value, output[rows], lse[:, rows])
            dq, dk, dv = kernels_for(query, prompt, rule).backward(*own, prompt, rule)
            d_query[rows] += dq
            keys.add(dk)
            values.add(dv)
        return d_query, d_key, d_value, None, None, None
