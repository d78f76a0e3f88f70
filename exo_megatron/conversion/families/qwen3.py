"""Qwen 3: Llama's tensors with norms of query and key heads; the upper layers may have a window."""

from __future__ import annotations

from exo_megatron.conversion.decoder_tables import decoder_family
from exo_megatron.conversion.hf_config import HfConfig
from exo_megatron.conversion.hf_decoder import DecoderDefaults, forbid_attention_bias, read_decoder, with_upper_windows
from exo_megatron.models.spec import ModelSpec


def _read(config: HfConfig) -> ModelSpec:
    forbid_attention_bias(config)
    spec = read_decoder(
        config, DecoderDefaults(positions=32768, kv_heads=32, head_dim=128), family="qwen3", qk_norm=True
    )
    return with_upper_windows(config, spec)


QWEN3 = decoder_family("qwen3", "Qwen3", _read)
