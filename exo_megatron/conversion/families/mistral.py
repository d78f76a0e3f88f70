"""Mistral: Llama's tensors; in some versions every layer has a window."""

from __future__ import annotations

from exo_megatron.conversion.decoder_tables import decoder_family
from exo_megatron.conversion.hf_config import HfConfig
from exo_megatron.conversion.hf_decoder import DecoderDefaults, read_decoder, with_window
from exo_megatron.models.spec import ModelSpec


def _read(config: HfConfig) -> ModelSpec:
    spec = read_decoder(config, DecoderDefaults(positions=131072, kv_heads=8), family="mistral")
    return with_window(config, spec, config.optional_integer("sliding_window", 4096))


MISTRAL = decoder_family("mistral", "Mistral", _read)
