"""Core attention of a part of a group: causal over its own candidates, and over the stored prompt; merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from exo_megatron.models.attention_kernels import kernels_for
from exo_megatron.models.attention_pass import QKV, Attended, ScoreRule, segment_pass
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
        attended = kernels_for(query, segments, rule).forward(QKV(query, key, value), segments, rule)
        if prompt is not None:
            keys, values = layout.shared.keys[layer_number].value, layout.shared.values[layer_number].value
            kernels_for(query, prompt, rule).merge(attended, QKV(query, keys, values), prompt, rule)
        ctx.save_for_backward(query, key, value, *attended)
        ctx.layout, ctx.layer_number, ctx.rule = layout, layer_number, rule
        return attended.output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, *attended = ctx.saved_tensors
        merged = Attended(*attended)
        layout: PartLayout = ctx.layout
        rule: ScoreRule = ctx.rule
        segments, prompt = segment_pass(layout.row), layout.prompt
        kernels = kernels_for(query, segments, rule)
        totals = kernels.gradients(None, grads[0], QKV(query, key, value), merged, segments, rule)
        if prompt is not None:
            keys, values = layout.shared.keys[ctx.layer_number], layout.shared.values[ctx.layer_number]
            with_prompt = QKV(totals.query, keys.gradient, values.gradient)
            seen = QKV(query, keys.value, values.value)
            kernels_for(query, prompt, rule).gradients(with_prompt, grads[0], seen, merged, prompt, rule)
        return *totals, None, None, None
