"""GLM-4-9B in the layout of transformers. Half of every head is rotated, in pairs of neighbours."""

from __future__ import annotations

from typing import Any

from exo_megatron.conversion.decoder_tables import decoder_family, decoder_tensors, one_feed_forward
from exo_megatron.conversion.hf_config import HfConfig
from exo_megatron.conversion.hf_decoder import DecoderDefaults, read_decoder
from exo_megatron.conversion.hf_rope import RopeKeys
from exo_megatron.models.spec import ModelSpec

_DEFAULTS = DecoderDefaults(
    positions=131072,
    kv_heads=2,
    head_dim=128,
    norm_epsilon=1.5625e-07,
    rope=RopeKeys(partial=0.5, interleaved=True),
)


def read_glm(config: HfConfig, **rest: Any) -> ModelSpec:
    """Read the keys that GLM and GLM-4-0414 share. `rest` holds fields of ModelSpec."""
    return read_decoder(config, _DEFAULTS, qkv_bias=config.flag("attention_bias", True), **rest)


def _read(config: HfConfig) -> ModelSpec:
    return read_glm(config, family="glm")


GLM = decoder_family("glm", "Glm", _read, decoder_tensors(feed_forward=one_feed_forward))
