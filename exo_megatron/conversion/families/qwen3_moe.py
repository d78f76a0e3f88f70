"""Qwen 3 with a mixture of experts in every layer."""

from __future__ import annotations

from exo_megatron.conversion.decoder_tables import decoder_family, decoder_tensors
from exo_megatron.conversion.hf_config import HfConfig
from exo_megatron.conversion.hf_decoder import (
    DecoderDefaults,
    forbid_attention_bias,
    read_decoder,
    read_experts,
    with_window,
)
from exo_megatron.conversion.rules import TensorRule
from exo_megatron.conversion.tables import Table
from exo_megatron.models.spec import LARGEST_EXPERTS, ModelSpec

_DENSE = "layers without experts among layers with experts are not supported"


def _read(config: HfConfig) -> ModelSpec:
    forbid_attention_bias(config)
    config.require("decoder_sparse_step", (1,), _DENSE)
    config.require("mlp_only_layers", ([],), _DENSE)
    # transformers 4 and 5 use different keys.
    count = "num_experts" if "num_experts" in config.values else "num_local_experts"
    experts = read_experts(
        config,
        count=config.integer(count, 128, maximum=LARGEST_EXPERTS),
        per_token=config.integer("num_experts_per_tok", 8),
        ffn_hidden_size=config.integer("moe_intermediate_size", 768),
        normalized=config.flag("norm_topk_prob", False),
    )
    spec = read_decoder(
        config,
        DecoderDefaults(positions=32768, kv_heads=4),
        family="qwen3_moe",
        qk_norm=True,
        experts=experts,
        ffn_hidden_size=experts.ffn_hidden_size,
    )
    has_window = config.flag("use_sliding_window", False)
    return with_window(config, spec, config.optional_integer("sliding_window", 4096) if has_window else None)


def _experts(table: Table) -> list[TensorRule]:
    up = ("mlp.experts.{1}.gate_proj", "mlp.experts.{1}.up_proj")
    return table.experts("mlp.gate", up, "mlp.experts.{1}.down_proj")


QWEN3_MOE = decoder_family("qwen3_moe", "Qwen3Moe", _read, decoder_tensors(feed_forward=_experts))
