"""What a decoder layer is made of: megatron-core layer specs from a ModelSpec."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn import functional

from exo_megatron.models.attention import GroupAttention
from exo_megatron.models.attention_pass import ScoreRule
from exo_megatron.models.decode import Layout
from exo_megatron.models.experts import experts_spec
from exo_megatron.models.linear import LinearBackend
from exo_megatron.models.norms import NormedResidual, norm_spec
from exo_megatron.models.spec import ModelSpec

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def block_spec(
    spec: ModelSpec, config: TransformerConfig, linear: LinearBackend, layers: range
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the final norm. layers: their numbers, from 0 over all stages."""
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(spec, config, linear, layer) for layer in layers], layer_norm=_norm(spec)
    )


class ParallelResidualLayer(TransformerLayer):
    """A layer whose attention and feed-forward block both read its input: x + attention(x) + feed_forward(x)."""

    def forward(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: Layout, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Called by megatron-core's block. [S, 1, H] -> [S, 1, H] and no cross-attention context."""
        attended = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask=None, packed_seq_params=packed_seq_params
        )
        transformed = self.mlp(self.pre_mlp_layernorm(hidden_states))
        for part in (*attended, *transformed):  # outputs, and biases where there are any
            if part is not None:
                hidden_states = hidden_states + part
        return hidden_states, None


class SequentialLayer(TransformerLayer):
    """A layer whose feed-forward block reads what attention has left.

    megatron-core turns gradients on around residual connections, where a bias or a norm would then keep the whole
    graph of a pass without gradients. Here the caller's mode holds everywhere.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias_dropout_add_exec_handler = nullcontext


def _layer_spec(spec: ModelSpec, config: TransformerConfig, linear: LinearBackend, layer: int) -> ModuleSpec:
    """A pre-norm decoder layer: norm, self attention over candidate groups, norm, feed-forward block or experts."""
    return ModuleSpec(
        module=ParallelResidualLayer if spec.parallel_residual else SequentialLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=_norm(spec),
            self_attention=_attention(spec, linear, layer),
            self_attn_bda=_residual(spec, config),
            pre_mlp_layernorm=_norm(spec),
            mlp=experts_spec(linear) if spec.experts else get_mlp_module_spec_for_backend(backend=linear),
            mlp_bda=_residual(spec, config),
        ),
    )


def _attention(spec: ModelSpec, linear: LinearBackend, layer: int) -> ModuleSpec:
    rule = ScoreRule(
        scale=spec.attention_scale or spec.head_dim**-0.5,
        softcap=spec.attention_softcap,
        window=spec.window(layer),
    )
    head_norm = _norm(spec) if spec.qk_norm else None
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear.column_parallel_linear(),
            core_attention=ModuleSpec(module=GroupAttention, params={"rule": rule, "rotary": spec.rotary}),
            linear_proj=linear.row_parallel_linear(),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def _norm(spec: ModelSpec) -> ModuleSpec:
    return norm_spec(spec.norm, zero_centered=spec.zero_centered_norm)


def _residual(spec: ModelSpec, config: TransformerConfig) -> Any:
    if not spec.post_norms:
        return get_bias_dropout_add
    return ModuleSpec(module=NormedResidual, params={"config": config, "zero_centered": spec.zero_centered_norm})
