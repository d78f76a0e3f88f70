"""Llama 1 to 3: RMSNorm, SwiGLU, rotary positions, grouped heads, tied or untied embeddings."""

from __future__ import annotations

from exo_megatron.conversion.decoder_tables import decoder_family
from exo_megatron.conversion.hf_config import HfConfig
from exo_megatron.conversion.hf_decoder import DecoderDefaults, read_decoder
from exo_megatron.models.spec import ModelSpec


def _read(config: HfConfig) -> ModelSpec:
    attention_bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    if attention_bias != mlp_bias:
        raise config.unsupported("attention_bias", attention_bias, f"the same as mlp_bias ({mlp_bias})")
    return read_decoder(
        config, DecoderDefaults(positions=2048), family="llama", qkv_bias=attention_bias, linear_bias=mlp_bias
    )


LLAMA = decoder_family("llama", "Llama", _read)
