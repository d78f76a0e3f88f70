"""Gemma 3, text only: Gemma 2 with norms of query and key heads.

Layers with a window have a rotary base of their own.
"""

from __future__ import annotations

from exo_megatron.conversion.decoder_tables import decoder_family
from exo_megatron.conversion.families.gemma2 import GEMMA_TENSORS, read_gemma
from exo_megatron.conversion.hf_config import HfConfig
from exo_megatron.conversion.hf_decoder import DecoderDefaults
from exo_megatron.conversion.hf_rope import RopeKeys
from exo_megatron.models.spec import ModelSpec

_ROPE = RopeKeys(base=1e6, local_base=1e4, kinds=("linear",))
_DEFAULTS = DecoderDefaults(positions=131072, kv_heads=4, head_dim=256, tied=True, rope=_ROPE)


def _read(config: HfConfig) -> ModelSpec:
    pattern = config.integer("sliding_window_pattern", 6)
    config.require("attn_logit_softcapping", (), "transformers does not apply it in this family")
    return read_gemma(
        config,
        _DEFAULTS,
        lambda layer: (layer + 1) % pattern != 0,
        family="gemma3_text",
        qk_norm=True,
        logit_softcap=config.optional_number("final_logit_softcapping", None),
    )


GEMMA3 = decoder_family("gemma3_text", "Gemma3", _read, GEMMA_TENSORS, classifier="Gemma3Text")
