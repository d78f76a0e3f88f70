"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from exo_megatron.conversion.decoder_tables import decoder_family, decoder_tensors
from exo_megatron.conversion.hf_config import HfConfig
from exo_megatron.conversion.hf_decoder import DecoderDefaults, read_decoder, read_experts, with_window
from exo_megatron.conversion.hf_rope import RopeKeys
from exo_megatron.conversion.rules import TensorRule
from exo_megatron.conversion.tables import Table
from exo_megatron.models.spec import LARGEST_EXPERTS, ModelSpec

_DEFAULTS = DecoderDefaults(positions=131072, kv_heads=8, norm_epsilon=1e-5, rope=RopeKeys(base=1e6))


def _read(config: HfConfig) -> ModelSpec:
    experts = read_experts(
        config,
        count=config.integer("num_local_experts", 8, maximum=LARGEST_EXPERTS),
        per_token=config.integer("num_experts_per_tok", 2),
        ffn_hidden_size=config.integer("intermediate_size"),
        normalized=True,
    )
    spec = read_decoder(config, _DEFAULTS, family="mixtral", experts=experts)
    return with_window(config, spec, config.optional_integer("sliding_window", None))


def _experts(table: Table) -> list[TensorRule]:
    up = ("block_sparse_moe.experts.{1}.w1", "block_sparse_moe.experts.{1}.w3")
    return table.experts("block_sparse_moe.gate", up, "block_sparse_moe.experts.{1}.w2")


MIXTRAL = decoder_family("mixtral", "Mixtral", _read, decoder_tensors(feed_forward=_experts))
