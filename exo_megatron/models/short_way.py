"""megatron-core's modules with a short way through them for passes without gradients.

A pass of generation carries few tokens, and what megatron-core does around a matrix product for the
sake of gradients, of several tensor ranks and of features that are not used here takes the host
longer than the product takes. The short way computes the same values by the same operations; names,
weights and checkpoints stay megatron-core's.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from exo_megatron.models.layouts.base import Layout


class ColumnLinear(ColumnParallelLinear):
    """Linear that is cut along its output; without gradients, a product where it is whole."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Multiply [S, 1, I] -> [S, 1, O / t] and return it with the bias that is yet to be added."""
        if torch.is_grad_enabled() or self.output_size_per_partition != self.output_size:
            result: tuple[Tensor, Tensor | None] = super().forward(input_, *args, **kwargs)
            return result
        return _whole_product(self, input_)


class RowLinear(RowParallelLinear):
    """Linear that is cut along its input; without gradients, a product where it is whole."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Multiply [S, 1, I / t] -> [S, 1, O] and return it with the bias that is yet to be added."""
        if torch.is_grad_enabled() or self.input_size_per_partition != self.input_size:
            result: tuple[Tensor, Tensor | None] = super().forward(input_)
            return result
        return _whole_product(self, input_)


def _whole_product(linear: ColumnLinear | RowLinear, input_: Tensor) -> tuple[Tensor, Tensor | None]:
    output = torch.matmul(input_, linear.weight.t())
    if linear.bias is None or linear.skip_bias_add:
        return output, linear.bias
    return output + linear.bias, None


class Attention(SelfAttention):
    """megatron-core's self-attention; without gradients, only the steps that a layout needs."""

    def forward(
        self, hidden_states: Tensor, attention_mask: None, *args: Any, packed_seq_params: Layout, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend: [S, 1, H] (S / t under sequence parallelism) -> the same, and a bias to be added."""
        if torch.is_grad_enabled():
            result: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, attention_mask, *args, packed_seq_params=packed_seq_params, **kwargs
            )
            return result
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        attended = self.core_attention(query, key, value, None, packed_seq_params=packed_seq_params)
        projected: tuple[Tensor, Tensor | None] = self.linear_proj(attended)
        return projected


class SequentialLayer(TransformerLayer):
    """A layer whose feed-forward block reads the output of attention.

    megatron-core turns gradients on around residual connections, where a bias or a norm would then
    keep the whole graph of a pass without gradients. Here the caller's mode holds everywhere.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias_dropout_add_exec_handler = nullcontext

    def forward(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: Layout, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Run the layer: [S, 1, H] -> [S, 1, H] and no cross-attention context."""
        if torch.is_grad_enabled():
            result: tuple[Tensor, None] = super().forward(
                hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs
            )
            return result
        attended = self.self_attention(self.input_layernorm(hidden_states), None, packed_seq_params=packed_seq_params)
        hidden_states = self._add(self.self_attn_bda, attended, hidden_states)
        transformed = self.mlp(self.pre_mlp_layernorm(hidden_states))
        return self._add(self.mlp_bda, transformed, hidden_states), None

    def _add(self, residual_connection: Any, output: tuple[Tensor, Tensor | None], hidden: Tensor) -> Tensor:
        added: Tensor = residual_connection(self.training, self.config.bias_dropout_fusion)(
            output, hidden, self.hidden_dropout
        )
        return added


class ParallelResidualLayer(TransformerLayer):
    """A layer whose attention and feed-forward block both read its input.

    x + attention(x) + feed_forward(x).
    """

    def forward(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: Layout, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Run the layer: [S, 1, H] -> [S, 1, H] and no cross-attention context."""
        attended = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask=None, packed_seq_params=packed_seq_params
        )
        transformed = self.mlp(self.pre_mlp_layernorm(hidden_states))
        for part in (*attended, *transformed):  # outputs, and biases where there are any
            if part is not None:
                hidden_states = hidden_states + part
        return hidden_states, None
