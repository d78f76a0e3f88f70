"""Phi 3, 3.5 and 4: Llama with fused projections.

Versions for long texts are converted for their original length (4096 tokens), see hf_rope.
transformers uses other frequencies for longer texts.
"""

from __future__ import annotations

from exo_megatron.conversion.decoder_tables import decoder_family, decoder_tensors, one_feed_forward, one_qkv
from exo_megatron.conversion.hf_config import HfConfig
from exo_megatron.conversion.hf_decoder import DecoderDefaults, read_decoder, with_window
from exo_megatron.conversion.hf_rope import RopeKeys
from exo_megatron.models.spec import ModelSpec

_ROPE = RopeKeys(partial=1.0, original=4096, kinds=("longrope",), aliases=(("su", "longrope"), ("yarn", "longrope")))


def _read(config: HfConfig) -> ModelSpec:
    spec = read_decoder(config, DecoderDefaults(positions=4096, norm_epsilon=1e-5, rope=_ROPE), family="phi3")
    return with_window(config, spec, config.optional_integer("sliding_window", None))


PHI3 = decoder_family("phi3", "Phi3", _read, decoder_tensors(qkv=one_qkv, feed_forward=one_feed_forward))
