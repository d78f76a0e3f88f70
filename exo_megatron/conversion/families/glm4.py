"""GLM-4-0414: GLM with norms after attention and after the feed-forward block."""

from __future__ import annotations

from exo_megatron.conversion.decoder_tables import PRE_NORMS, decoder_family, decoder_tensors, one_feed_forward
from exo_megatron.conversion.families.glm import read_glm
from exo_megatron.conversion.hf_config import HfConfig
from exo_megatron.models.spec import ModelSpec

_NORMS = {
    **PRE_NORMS,
    "self_attn_bda.norm": "post_self_attn_layernorm",
    "mlp_bda.norm": "post_mlp_layernorm",
}


def _read(config: HfConfig) -> ModelSpec:
    return read_glm(config, family="glm4", post_norms=True)


GLM4 = decoder_family("glm4", "Glm4", _read, decoder_tensors(_NORMS, feed_forward=one_feed_forward))
