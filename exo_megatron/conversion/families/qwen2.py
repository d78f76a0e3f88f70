"""Qwen 1.5, 2 and 2.5: Llama's tensors with biases of query, key and value.

The upper layers may have a window.
"""

from __future__ import annotations

from exo_megatron.conversion.decoder_tables import decoder_family
from exo_megatron.conversion.hf_config import HfConfig
from exo_megatron.conversion.hf_decoder import DecoderDefaults, read_decoder, with_upper_windows
from exo_megatron.models.spec import ModelSpec


def _read(config: HfConfig) -> ModelSpec:
    spec = read_decoder(config, DecoderDefaults(positions=32768, kv_heads=32), family="qwen2", qkv_bias=True)
    return with_upper_windows(config, spec)


QWEN2 = decoder_family("qwen2", "Qwen2", _read)
