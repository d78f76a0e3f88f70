"""The layers as megatron-core specs, and the modules in them that megatron-core lacks.

Passes without gradients take a short way through megatron-core's modules: a pass of generation
carries few tokens, and what is done around a product for the sake of gradients, tensor ranks and
unused features takes the host longer than the product. Values, names and checkpoints stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from exo_megatron.models.attention.passes import ScoreRule
from exo_megatron.models.experts import ExpertBlock
from exo_megatron.models.layouts.base import Layout
from exo_megatron.models.numerics import ACTIVATIONS, LayerNorm, RMSNorm, gated
from exo_megatron.models.rotary import RotaryTable, RotaryTables
from exo_megatron.models.spec import ModelSpec


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


@dataclass(frozen=True)
class Backend:
    """The part of megatron-core's backend protocol that dense layers ask for.

    Norms are never fused into linears.
    """

    column: Any
    row: Any
    activation: ModuleSpec

    def column_parallel_linear(self) -> Any:
        """Return the linear that is cut along its output."""
        return self.column

    def row_parallel_linear(self) -> Any:
        """Return the linear that is cut along its input."""
        return self.row

    def activation_func(self) -> Any:
        """Return the module between the two linears of a feed-forward block."""
        return self.activation

    def fuse_layernorm_and_linear(self) -> bool:
        """Refuse fusion, so that Transformer Engine does not change tensor names."""
        return False


def backend(spec: ModelSpec, dtype: torch.dtype) -> Backend:
    """Choose Transformer Engine's linears if it works and there is a GPU, else megatron-core's own.

    dtype: of the parameters. In fp32 megatron-core's own are chosen too, because Transformer Engine
    multiplies fp32 matrices in TF32, with 10 bits of mantissa, whatever torch is told.
    """
    activation = ModuleSpec(module=BlockActivation, params={"name": spec.activation, "gated": spec.gated})
    if torch.cuda.is_available() and dtype != torch.float32:
        from megatron.core.extensions import transformer_engine

        if transformer_engine.HAVE_TE:  # it and its torch part can be imported
            column, row = transformer_engine.TEColumnParallelLinear, transformer_engine.TERowParallelLinear
            return Backend(column, row, activation)
    return Backend(ColumnLinear, RowLinear, activation)


@dataclass(frozen=True)
class ExpertBlockSpec:
    """Specify the block of router and experts for both versions of megatron-core.

    0.16 builds it from the attributes, as it does with a ModuleSpec, which would make it warn of a
    block that it does not know; 0.19 calls it.
    """

    params: dict[str, ModuleSpec]
    module: type[ExpertBlock] = ExpertBlock

    def __call__(self, config: TransformerConfig, **kwargs: Any) -> ExpertBlock:
        """Build the block."""
        return self.module(config, **self.params, **kwargs)


def block_spec(spec: ModelSpec, config: TransformerConfig, layers: range) -> TransformerBlockSubmodules:
    """Specify the layers of one pipeline stage and the final norm.

    Args:
        spec: the model.
        config: megatron-core's configuration of it.
        layers: numbers of the layers, from 0 over all pipeline stages.
    """
    parts = backend(spec, config.params_dtype)
    tables = RotaryTables(spec, torch.device(torch.cuda.current_device()))
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(spec, config, parts, layer, tables.of(layer)) for layer in layers],
        layer_norm=_norm(spec),
    )


class NormedResidual(torch.nn.Module):
    """The residual connection of models that normalise what they add: residual + norm(output).

    It replaces megatron-core's bias-dropout-add and follows its calling convention.
    """

    def __init__(self, config: TransformerConfig, zero_centered: bool) -> None:
        super().__init__()
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon, zero_centered)

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """Return the function that adds. Dropout is 0 in training too, and nothing is fused."""
        return self._add

    def _add(self, output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        output, bias = output_with_bias
        normed: Tensor = self.norm(output if bias is None else output + bias)
        return residual + normed


class BlockActivation(MegatronModule):
    """f(x), or f(gate) * up for x = [gate | up] where the block is gated. It has no parameters.

    megatron-core asks for such a module, which gets all that the first product gave, where it would
    ask Transformer Engine (`use_te_activation_func`). Its own fused SwiGLU has 13 operators unless
    torch.compile joins them, which it would do for every length of a micro-batch.
    """

    def __init__(self, config: TransformerConfig, *, name: str, gated: bool) -> None:
        """Take the arguments with which megatron-core builds it, and those of our layer spec."""
        super().__init__(config=config)
        self.function = ACTIVATIONS[name]
        self.gated = gated

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute [..., F] -> [..., F], or [..., 2F] -> [..., F] where it is gated."""
        return gated(hidden, self.function) if self.gated else self.function.of(hidden)


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


class CoreAttention(torch.nn.Module):
    """megatron-core's `core_attention`: rotates queries and keys, and attends as the layout does.

    It has no parameters. Rotation is here, so that layers may differ in their rotary embedding.
    Heads are this tensor-parallel rank's own: no communication.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        *,
        rule: ScoreRule,
        table: RotaryTable | None,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: object = None,
    ) -> None:
        """Accept the arguments of megatron-core's own core attention, and those of our layer spec.

        layer_number counts from 1 over all pipeline stages. Scale, mask type and attention type
        follow from the rule and the layout; context parallelism is refused when the topology is
        made.
        """
        super().__init__()
        self.layer_number = layer_number
        self.rule = rule
        self.table = table

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Layout,
    ) -> Tensor:
        """Attend.

        Args:
            query: [S, 1, hq, d].
            key, value: [S, 1, hkv, d].
            attention_mask, attn_mask_type, attention_bias: of megatron-core's interface, not read.
            packed_seq_params: the layout.

        Returns:
            [S, 1, hq * d].
        """
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.table is not None:
            query, key = self.table.rotate(query, key, packed_seq_params.position_ids)
        output = packed_seq_params.attend(query, key, value, layer_number=self.layer_number, rule=self.rule)
        return output.reshape(output.shape[0], 1, -1)


def _layer_spec(
    spec: ModelSpec, config: TransformerConfig, parts: Backend, layer: int, table: RotaryTable | None
) -> ModuleSpec:
    """Specify pre-norm decoder layer `layer`: norm, attention, norm, feed-forward or experts."""
    return ModuleSpec(
        module=ParallelResidualLayer if spec.parallel_residual else SequentialLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=_norm(spec),
            self_attention=_attention(spec, parts, layer, table),
            self_attn_bda=_residual(spec, config),
            pre_mlp_layernorm=_norm(spec),
            mlp=_feed_forward(spec, parts),
            mlp_bda=_residual(spec, config),
        ),
    )


def _attention(spec: ModelSpec, parts: Backend, layer: int, table: RotaryTable | None) -> ModuleSpec:
    rule = ScoreRule(
        scale=spec.attention_scale or spec.head_dim**-0.5,
        softcap=spec.attention_softcap,
        window=spec.window(layer),
    )
    head_norm = _norm(spec) if spec.qk_norm else None
    return ModuleSpec(
        module=Attention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=parts.column_parallel_linear(),
            core_attention=ModuleSpec(module=CoreAttention, params={"rule": rule, "table": table}),
            linear_proj=parts.row_parallel_linear(),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def _feed_forward(spec: ModelSpec, parts: Backend) -> Any:
    """Specify the feed-forward block, or router and experts."""
    if spec.experts is None:
        return get_mlp_module_spec_for_backend(parts, use_te_activation_func=True)
    return ExpertBlockSpec({"activation": parts.activation})


def _norm(spec: ModelSpec) -> ModuleSpec:
    if spec.norm == "layer":
        return ModuleSpec(module=LayerNorm)
    return ModuleSpec(module=RMSNorm, params={"zero_centered": spec.zero_centered_norm})


def plain_residual(training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
    """Return the function that adds. Dropout is 0 in training too, and nothing is fused.

    It replaces megatron-core's bias-dropout-add and follows its calling convention.
    """
    return _added


def _added(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
    output, bias = output_with_bias
    return residual + (output if bias is None else output + bias)


def _residual(spec: ModelSpec, config: TransformerConfig) -> Any:
    if not spec.post_norms:
        return plain_residual
    return ModuleSpec(module=NormedResidual, params={"config": config, "zero_centered": spec.zero_centered_norm})
