"""Core attention over candidate groups: two passes merged by log-sum-exp, with the backward written by hand.

First pass: causal attention inside every segment (each prompt, each candidate, the padding). Second pass: every
response token over its whole prompt, not causal. A response row's softmax over the union of both key sets is the
merge of the two partial results by their log-sum-exps (LSE), as in flash attention's split over keys and in ring
attention. For the backward, flash attention needs only the *merged* output and LSE, so each pass's own kernel is
called with them: with P = exp(scale q k^T - LSE_merged) and delta = rowsum(dO * O_merged), its gradients are exactly
that pass's share of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from exo_megatron.models.attention_kernels import AttentionPass, kernels_for, segment_pass
from exo_megatron.models.decode import DecodeLayout
from exo_megatron.models.layout import GroupLayout


class GroupAttention(torch.nn.Module):
    """megatron-core's `core_attention` for rows of candidate groups (training) and for decoding (rollout).

    Without parameters. Heads are this tensor-parallel rank's own: no communication.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: object = None,
    ) -> None:
        """Built by megatron-core's Attention with the arguments of its own core attention.

        layer_number counts from 1 over all pipeline stages. Mask type and attention type follow from the layout;
        context parallelism is refused when the topology is made.
        """
        super().__init__()
        self.layer_number = layer_number
        self.scale = softmax_scale if softmax_scale is not None else float(config.kv_channels or 0) ** -0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: GroupLayout | DecodeLayout | PackedSeqParams | None = None,
    ) -> Tensor:
        """query [S, 1, hq, d], key and value [S, 1, hkv, d], rotary applied -> [S, 1, hq * d]."""
        if isinstance(packed_seq_params, DecodeLayout):
            return packed_seq_params.attend(query, key, value, layer_number=self.layer_number, scale=self.scale)
        if not isinstance(packed_seq_params, GroupLayout):
            raise TypeError(f"core attention needs a GroupLayout or DecodeLayout, got {type(packed_seq_params)}")
        output = group_attention(query.squeeze(1), key.squeeze(1), value.squeeze(1), packed_seq_params, self.scale)
        return output.reshape(output.shape[0], 1, -1)


def group_attention(query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, scale: float) -> Tensor:
    """Attention of one packed row. query [S, hq, d], key and value [S, hkv, d] -> [S, hq, d]; differentiable."""
    apply: Callable[..., Tensor] = _GroupAttention.apply
    return apply(query, key, value, layout, scale)


class _GroupAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, scale: float) -> Tensor:
        kernels = kernels_for(query)
        output, lse = kernels.forward(query, key, value, segment_pass(layout), scale)
        if layout.groups:
            rows, keys = layout.response_rows, layout.prompt_rows
            part = kernels.forward(query[rows], key[keys], value[keys], _prompt_pass(layout), scale)
            _merge(output, lse, rows, *part)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, output, lse = ctx.saved_tensors
        layout: GroupLayout = ctx.layout
        scale: float = ctx.scale
        grad = grads[0].contiguous()
        kernels = kernels_for(query)
        segments = segment_pass(layout)
        d_query, d_key, d_value = kernels.backward(grad, query, key, value, output, lse, segments, scale)
        if layout.groups:
            rows, keys = layout.response_rows, layout.prompt_rows
            own = (grad[rows], query[rows], key[keys], value[keys], output[rows], lse[:, rows])
            dq, dk, dv = kernels.backward(*own, _prompt_pass(layout), scale)
            d_query.index_add_(0, rows, dq)
            d_key.index_add_(0, keys, dk)
            d_value.index_add_(0, keys, dv)
        return d_query, d_key, d_value, None, None


def _prompt_pass(layout: GroupLayout) -> AttentionPass:
    """The second pass: the responses of each group, one block of queries, over their prompt."""
    return AttentionPass(
        causal=False,
        query_lengths=tuple(group.response_total for group in layout.groups),
        key_lengths=tuple(group.prompt_length for group in layout.groups),
        query_bounds=layout.response_cu_seqlens,
        key_bounds=layout.prompt_cu_seqlens,
    )


def _merge(output: Tensor, lse: Tensor, rows: Tensor, other_output: Tensor, other_lse: Tensor) -> None:
    """Merge a pass over other keys into `output` [S, hq, d] and `lse` [hq, S], in place, on these rows."""
    own_lse = lse[:, rows]
    merged_lse = torch.logaddexp(own_lse, other_lse)
    own_share = (own_lse - merged_lse).exp().t().unsqueeze(-1)
    other_share = (other_lse - merged_lse).exp().t().unsqueeze(-1)
    output[rows] = (output[rows] * own_share + other_output * other_share).to(output.dtype)
    lse[:, rows] = merged_lse
