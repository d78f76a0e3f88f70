"""GPT-NeoX and Pythia: LayerNorm, biases, attention and feed-forward block in parallel.

Part of every head is rotated. The rows of `query_key_value` are already in megatron-core's order.
"""

from __future__ import annotations

import re

from exo_megatron.conversion.hf_config import HfConfig
from exo_megatron.conversion.hf_decoder import even_share, read_activation, with_head
from exo_megatron.conversion.hf_rope import RopeKeys, read_rope
from exo_megatron.conversion.rules import Family, TensorRule
from exo_megatron.conversion.tables import Table
from exo_megatron.conversion.transforms import same
from exo_megatron.models.spec import LARGEST_LAYERS, ModelSpec

_ROPE = RopeKeys(base_key="rotary_emb_base", partial=0.25, partial_key="rotary_pct")


def _read(config: HfConfig) -> ModelSpec:
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = even_share(config, hidden, heads)
    config.require(
        "attention_bias", (True,), "a feed-forward block with biases beside attention without is not supported"
    )
    rotary, positions = read_rope(
        config, _ROPE, head_dim=head_dim, positions=config.integer("max_position_embeddings", 2048)
    )
    return ModelSpec(
        family="gpt_neox",
        layers=config.integer("num_hidden_layers", maximum=LARGEST_LAYERS),
        hidden_size=hidden,
        ffn_hidden_size=config.integer("intermediate_size"),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        vocab_size=config.integer("vocab_size"),
        max_positions=positions,
        norm="layer",
        norm_epsilon=config.number("layer_norm_eps", 1e-5),
        parallel_residual=config.flag("use_parallel_residual", True),
        rotary=rotary,
        activation=read_activation(config, "hidden_act", "gelu"),
        gated=False,
        qkv_bias=True,
        linear_bias=True,
        tied_embeddings=config.flag("tie_word_embeddings", False),
    )


def _tensors(spec: ModelSpec) -> tuple[TensorRule, ...]:
    table = Table(spec, "gpt_neox.layers.{0}")
    return (
        *table.embedding("gpt_neox.embed_in"),
        *table.norm("input_layernorm", "input_layernorm"),
        *table.fused_qkv("attention.query_key_value", same()),
        *table.attention_output("attention.dense"),
        *table.norm("pre_mlp_layernorm", "post_attention_layernorm"),
        *table.feed_forward(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
        *table.final_norm("gpt_neox.final_layer_norm"),
        *table.head("embed_out"),
    )


GPT_NEOX = Family(
    model_type="gpt_neox",
    architectures=("GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification"),
    read_config=with_head(_read),
    tensors=_tensors,
    base_prefix="gpt_neox.",
    tied_output=("embed_out.weight", "gpt_neox.embed_in.weight"),
    ignored=(re.compile(r"gpt_neox\.layers\.\d+\.attention\.(rotary_emb\.inv_freq|bias|masked_bias)"),),
)
