"""Core attention over candidate groups: two passes merged by log-sum-exp, with the backward written by hand.

First pass: causal attention inside every segment (each prompt, each candidate, the padding). Second pass: every
response token over its whole prompt, not causal. A response row's softmax over the union of both key sets is the
merge of the two partial results by their log-sum-exps (LSE), as in flash attention's split over keys and in ring
attention. For the backward, flash attention needs only the *merged* output and LSE, so each pass's own kernel is
called with them: with P = exp(scores - LSE_merged) and delta = rowsum(dO * O_merged), its gradients are exactly
that pass's share of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from exo_megatron.models.attention_kernels import kernels_for
from exo_megatron.models.attention_pass import QKV, Attended, ScoreRule, group_passes
from exo_megatron.models.decode import DecodeLayout, Layout
from exo_megatron.models.layout import GroupLayout
from exo_megatron.models.part_attention import part_attention
from exo_megatron.models.rotary import rotary_table
from exo_megatron.models.shared_prompt import PartLayout, PromptLayout
from exo_megatron.models.spec import Rotary


class GroupAttention(torch.nn.Module):
    """megatron-core's `core_attention` for rows of candidate groups or their parts, and for decoding.

    Without parameters. Rotates queries and keys by their positions first, so that layers may differ in their rotary
    embedding. Heads are this tensor-parallel rank's own: no communication.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        *,
        rule: ScoreRule,
        rotary: Rotary | None,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: object = None,
    ) -> None:
        """Built by megatron-core's Attention with the arguments of its own core attention, and by our layer spec.

        layer_number counts from 1 over all pipeline stages. Scale, mask type and attention type follow from the rule
        and the layout; context parallelism is refused when the topology is made.
        """
        super().__init__()
        self.layer_number = layer_number
        self.rule = rule
        device = torch.device(torch.cuda.current_device())
        self.table = None
        if rotary is not None:
            self.table = rotary_table(rotary, local=rule.window is not None, device=device)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Layout | PackedSeqParams | None = None,
    ) -> Tensor:
        """query [S, 1, hq, d], key and value [S, 1, hkv, d] -> [S, 1, hq * d]."""
        layout = packed_seq_params
        if not isinstance(layout, Layout):
            raise TypeError(f"core attention needs a Layout, got {type(layout)}")
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.table is not None:
            query, key = self.table.rotate(query, key, layout.position_ids)
        if isinstance(layout, DecodeLayout):
            output = layout.attend(query, key, value, layer_number=self.layer_number, rule=self.rule)
        elif isinstance(layout, PartLayout):
            output = part_attention(query, key, value, layout, self.layer_number, self.rule)
        elif isinstance(layout, PromptLayout):
            key, value = layout.shared.tap(self.layer_number, key, value)
            output = group_attention(query, key, value, layout.row, self.rule)
        else:
            output = group_attention(query, key, value, layout, self.rule)
        return output.reshape(output.shape[0], 1, -1)


def group_attention(query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, rule: ScoreRule) -> Tensor:
    """Attention of one packed row. query [S, hq, d], key and value [S, hkv, d] -> [S, hq, d]; differentiable."""
    apply: Callable[..., Tensor] = _GroupAttention.apply
    return apply(query, key, value, layout, rule)


class _GroupAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, rule: ScoreRule) -> Tensor:
        first, *others = ctx.passes = group_passes(layout)
        inputs = QKV(query, key, value)
        attended = kernels_for(query, first, rule).forward(inputs, first, rule)
        for which in others:
            kernels_for(query, which, rule).merge(attended, inputs, which, rule)
        ctx.save_for_backward(*inputs, *attended)
        ctx.rule = rule
        return attended.output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, *attended = ctx.saved_tensors
        first, *others = ctx.passes
        own = (grads[0], QKV(query, key, value), Attended(*attended))
        totals = kernels_for(query, first, ctx.rule).gradients(None, *own, first, ctx.rule)
        for which in others:
            totals = kernels_for(query, which, ctx.rule).gradients(totals, *own, which, ctx.rule)
        return *totals, None, None
