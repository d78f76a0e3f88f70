"""GPT-2: LayerNorm, learned positions, biases everywhere, matrices stored as [inputs, outputs].

`reorder_and_upcast_attn` is not read: it changes the precision of the scores only.
"""

from __future__ import annotations

import re

from exo_megatron.conversion.hf_config import HfConfig
from exo_megatron.conversion.hf_decoder import even_share, read_activation, with_head
from exo_megatron.conversion.rules import Family, TensorRule
from exo_megatron.conversion.tables import Table
from exo_megatron.conversion.transforms import fused_qkv
from exo_megatron.models.spec import LARGEST_LAYERS, ModelSpec


def _read(config: HfConfig) -> ModelSpec:
    hidden, heads = config.integer("n_embd"), config.integer("n_head")
    config.require("scale_attn_weights", (True,), "scores are always scaled here")
    config.require("scale_attn_by_inverse_layer_idx", (False,), "all layers scale their scores alike here")
    config.require("add_cross_attention", (False,), "there is no encoder here")
    return ModelSpec(
        family="gpt2",
        layers=config.integer("n_layer", maximum=LARGEST_LAYERS),
        hidden_size=hidden,
        ffn_hidden_size=config.integer("n_inner", 4 * hidden),
        heads=heads,
        kv_heads=heads,
        head_dim=even_share(config, hidden, heads, "n_head"),
        vocab_size=config.integer("vocab_size"),
        max_positions=config.integer("n_positions", 1024),
        norm="layer",
        norm_epsilon=config.number("layer_norm_epsilon", 1e-5),
        rotary=None,
        activation=read_activation(config, "activation_function", "gelu_new"),
        gated=False,
        qkv_bias=True,
        linear_bias=True,
        tied_embeddings=config.flag("tie_word_embeddings", True),
    )


def _tensors(spec: ModelSpec) -> tuple[TensorRule, ...]:
    table = Table(spec, "transformer.h.{0}", input_first=True)
    return (
        *table.embedding("transformer.wte"),
        *table.positions("transformer.wpe"),
        *table.norm("input_layernorm", "ln_1"),
        *table.fused_qkv("attn.c_attn", fused_qkv(spec.heads, spec.kv_heads, spec.head_dim)),
        *table.attention_output("attn.c_proj"),
        *table.norm("pre_mlp_layernorm", "ln_2"),
        *table.feed_forward(("mlp.c_fc",), "mlp.c_proj"),
        *table.final_norm("transformer.ln_f"),
        *table.head("lm_head"),
    )


GPT2 = Family(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    read_config=with_head(_read),
    tensors=_tensors,
    base_prefix="transformer.",
    tied_output=("lm_head.weight", "transformer.wte.weight"),
    ignored=(re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"),),
)
