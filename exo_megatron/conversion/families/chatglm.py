"""ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B in their published layout, whose HF code is remote.

RMSNorm, SwiGLU, few key/value heads. Half of every head is rotated, in pairs of neighbours. There
is no sequence classifier: the remote one has biases in its head.
"""

from __future__ import annotations

import re

from exo_megatron.conversion.hf_config import HfConfig
from exo_megatron.conversion.hf_decoder import with_head
from exo_megatron.conversion.rules import Family, TensorRule
from exo_megatron.conversion.tables import Table
from exo_megatron.conversion.transforms import fused_qkv
from exo_megatron.models.spec import LARGEST_LAYERS, ModelSpec, Rotary


def _read(config: HfConfig) -> ModelSpec:
    _check(config)
    hidden, heads = config.integer("hidden_size", 4096), config.integer("num_attention_heads", 32)
    head_dim = config.integer("kv_channels", 128)
    groups = config.integer("multi_query_group_num", 1)
    if heads % groups:
        raise config.unsupported("multi_query_group_num", groups, f"a divisor of the {heads} attention heads")
    bias = config.flag("add_bias_linear", False)
    return ModelSpec(
        family="chatglm",
        layers=config.integer("num_layers", 28, maximum=LARGEST_LAYERS),
        hidden_size=hidden,
        ffn_hidden_size=config.integer("ffn_hidden_size", 13696),
        heads=heads,
        kv_heads=groups,
        head_dim=head_dim,
        vocab_size=config.integer("padded_vocab_size", 65024),
        max_positions=config.integer("seq_length", 2048),
        norm_epsilon=config.number("layernorm_epsilon", 1e-5),
        rotary=Rotary(base=10000.0, dim=head_dim // 2, interleaved=True),
        qkv_bias=bias or config.flag("add_qkv_bias", False),
        linear_bias=bias,
    )


def _check(config: HfConfig) -> None:
    """Raise CheckpointError for options of the published code that no published model uses."""
    if "multi_query_attention" not in config.values:
        raise config.unsupported(
            "multi_query_attention",
            None,
            "true",
            "this is ChatGLM-6B, the first version, an encoder-decoder of its own",
        )
    config.require("multi_query_attention", (True,))
    config.require("rmsnorm", (True,))
    config.require("apply_residual_connection_post_layernorm", (False,))
    config.require("post_layer_norm", (True,))
    config.require("original_rope", (True,))
    config.require("fp32_residual_connection", (False,))
    config.require("tie_word_embeddings", (False,), "the published code does not tie them")
    config.require("quantization_bit", (0,), "weights have to be unquantised")
    config.require("pre_seq_len", (), "the prefix of P-tuning is not supported")
    config.require(
        "rope_ratio",
        (1, 1.0),
        "published versions disagree on whether it scales the base or the positions; GLM-4-9B exists in the layout of "
        "transformers (glm-4-9b-chat-hf)",
    )


def _tensors(spec: ModelSpec) -> tuple[TensorRule, ...]:
    table = Table(spec, "transformer.encoder.layers.{0}")
    return (
        *table.embedding("transformer.embedding.word_embeddings"),
        *table.norm("input_layernorm", "input_layernorm"),
        *table.fused_qkv("self_attention.query_key_value", fused_qkv(spec.heads, spec.kv_heads, spec.head_dim)),
        *table.attention_output("self_attention.dense"),
        *table.norm("pre_mlp_layernorm", "post_attention_layernorm"),
        *table.feed_forward(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
        *table.final_norm("transformer.encoder.final_layernorm"),
        *table.head("transformer.output_layer"),
    )


CHATGLM = Family(
    model_type="chatglm",
    architectures=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    read_config=with_head(_read),
    tensors=_tensors,
    base_prefix="transformer.",
    tied_output=("transformer.output_layer.weight", "transformer.embedding.word_embeddings.weight"),
    ignored=(re.compile(r"transformer\.rotary_pos_emb\.inv_freq"),),
)
