"""Llama 1 to 3: RMSNorm, SwiGLU, rotary positions, grouped-query heads, tied or untied embeddings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from exo_megatron.conversion.hf_config import HfConfig, read_rotary
from exo_megatron.conversion.rules import Family, TensorRule
from exo_megatron.conversion.transforms import Transform, grouped_qkv, padded_rows, same, stacked_rows
from exo_megatron.models.spec import ModelSpec, Rotary

_HF = "model.layers.{0}"
_MEGATRON = "decoder.layers"


def read_config(values: Mapping[str, Any], where: str) -> ModelSpec:
    """HF's LlamaConfig as a ModelSpec; keys that are absent have the defaults of transformers."""
    config = HfConfig(values, where)
    config.require("hidden_act", ("silu", "swish"))
    config.require("attention_dropout", (0, 0.0))
    heads = config.integer("num_attention_heads")
    hidden = config.integer("hidden_size")
    attention_bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    if attention_bias != mlp_bias:
        raise config.unsupported("attention_bias", attention_bias, f"the same as mlp_bias ({mlp_bias})")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.unsupported("num_key_value_heads", kv_heads, f"a divisor of the {heads} attention heads")
    if "head_dim" not in values and hidden % heads:
        raise config.unsupported("num_attention_heads", heads, f"a divisor of hidden_size ({hidden})")
    base, scaling = read_rotary(config, default_base=10000.0)
    return ModelSpec(
        family="llama",
        layers=config.integer("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=config.integer("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=config.integer("head_dim", hidden // heads),
        vocab_size=config.integer("vocab_size"),
        max_positions=config.integer("max_position_embeddings", 2048),
        norm_epsilon=config.number("rms_norm_eps", 1e-6),
        rotary=Rotary(base=base, dim=config.integer("head_dim", hidden // heads), scaling=scaling),
        tied_embeddings=config.flag("tie_word_embeddings", False),
        qkv_bias=attention_bias,
        linear_bias=mlp_bias,
    )


def tensors(spec: ModelSpec) -> tuple[TensorRule, ...]:
    """All tensors of a LlamaForCausalLM."""
    vocabulary, hidden, layers = spec.vocab_size, spec.hidden_size, (spec.layers,)
    padding = padded_rows(vocabulary, spec.padded_vocab_size)
    embedding_shapes = ((spec.padded_vocab_size, hidden), (vocabulary, hidden))

    def alone(key: str, name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], how: Transform) -> TensorRule:
        return TensorRule(key, shapes[0], ((name, shapes[1]),), how)

    def norm(key: str, name: str) -> TensorRule:
        return TensorRule(
            f"{_MEGATRON}.{key}.weight", (hidden,), ((f"{_HF}.{name}.weight", (hidden,)),), same(), layers
        )

    rules = [
        alone("embedding.word_embeddings.weight", "model.embed_tokens.weight", embedding_shapes, padding),
        norm("input_layernorm", "input_layernorm"),
        *_attention(spec),
        norm("pre_mlp_layernorm", "post_attention_layernorm"),
        *_feed_forward(spec),
        alone("decoder.final_layernorm.weight", "model.norm.weight", ((hidden,), (hidden,)), same()),
    ]
    if not spec.tied_embeddings:
        rules.append(alone("output_layer.weight", "lm_head.weight", embedding_shapes, padding))
    return tuple(rules)


def _attention(spec: ModelSpec) -> list[TensorRule]:
    query, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    qkv = grouped_qkv(spec.heads, spec.kv_heads, spec.head_dim)
    parts = (("q_proj", query), ("k_proj", keys), ("v_proj", keys))
    return [
        *_linear(spec, "self_attention.linear_qkv", "self_attn", parts, spec.hidden_size, qkv, bias=spec.qkv_bias),
        *_linear(
            spec,
            "self_attention.linear_proj",
            "self_attn",
            (("o_proj", spec.hidden_size),),
            query,
            same(),
            bias=spec.linear_bias,
        ),
    ]


def _feed_forward(spec: ModelSpec) -> list[TensorRule]:
    hidden, ffn, bias = spec.hidden_size, spec.ffn_hidden_size, spec.linear_bias
    gated = (("gate_proj", ffn), ("up_proj", ffn))
    return [
        *_linear(spec, "mlp.linear_fc1", "mlp", gated, hidden, stacked_rows(ffn, ffn), bias=bias),
        *_linear(spec, "mlp.linear_fc2", "mlp", (("down_proj", hidden),), ffn, same(), bias=bias),
    ]


def _linear(
    spec: ModelSpec,
    key: str,
    block: str,
    parts: tuple[tuple[str, int], ...],
    inputs: int,
    how: Transform,
    *,
    bias: bool,
) -> list[TensorRule]:
    """Rules of the weight, and of the bias if there is one, of one megatron-core linear made of HF linears.

    parts: HF names below `block` and their numbers of outputs.
    """
    outputs = sum(rows for _, rows in parts)

    def rule(what: str, rest: tuple[int, ...]) -> TensorRule:
        sources = tuple((f"{_HF}.{block}.{name}.{what}", (rows, *rest)) for name, rows in parts)
        return TensorRule(f"{_MEGATRON}.{key}.{what}", (outputs, *rest), sources, how, (spec.layers,))

    return [rule("weight", (inputs,)), *([rule("bias", ())] if bias else [])]


LLAMA = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    read_config=read_config,
    tensors=tensors,
    tied_output=("lm_head.weight", "model.embed_tokens.weight"),
    ignored=(re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),),
)
