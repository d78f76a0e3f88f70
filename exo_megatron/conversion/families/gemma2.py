"""Gemma 2: norms before and after every block that multiply by 1 + weight.

Scores and logits have soft caps, and every other layer has a window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from exo_megatron.conversion.decoder_tables import Tensors, decoder_family, decoder_tensors
from exo_megatron.conversion.hf_config import HfConfig
from exo_megatron.conversion.hf_decoder import (
    DecoderDefaults,
    forbid_attention_bias,
    read_activation,
    read_decoder,
    read_layer_types,
    windows,
)
from exo_megatron.models.spec import ModelSpec

GEMMA_TENSORS: Tensors = decoder_tensors(
    {
        "self_attn_bda.norm": "post_attention_layernorm",
        "pre_mlp_layernorm": "pre_feedforward_layernorm",
        "mlp_bda.norm": "post_feedforward_layernorm",
    }
)


def read_gemma(
    config: HfConfig, defaults: DecoderDefaults, is_sliding: Callable[[int], bool], **rest: Any
) -> ModelSpec:
    """Read the keys that the configs of Gemma 2 and 3 share.

    Args:
        config: the config.
        defaults: the family's defaults.
        is_sliding: tells which layers have a window if the config does not.
        **rest: fields of ModelSpec.
    """
    forbid_attention_bias(config)
    config.require("use_bidirectional_attention", (False,), "tokens would see later ones")
    spec = read_decoder(
        config,
        defaults,
        activation=read_activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        zero_centered_norm=True,
        post_norms=True,
        embedding_scale=config.integer("hidden_size") ** 0.5,
        attention_scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        **rest,
    )
    sliding = read_layer_types(config, spec.layers, is_sliding)
    window = config.optional_integer("sliding_window", 4096)
    # A window of all positions is kept if layers with windows have their own rotary base.
    longest = spec.max_positions + 1 if spec.rotary is not None and spec.rotary.local_base else spec.max_positions
    found = windows(config, sliding, window and min(window, spec.max_positions), longest)
    return spec.model_copy(update={"windows": found})


def _read(config: HfConfig) -> ModelSpec:
    return read_gemma(
        config,
        DecoderDefaults(positions=8192, kv_heads=4, head_dim=256, tied=True),
        lambda layer: layer % 2 == 0,
        family="gemma2",
        attention_softcap=config.optional_number("attn_logit_softcapping", 50.0),
        logit_softcap=config.optional_number("final_logit_softcapping", 30.0),
    )


GEMMA2 = decoder_family("gemma2", "Gemma2", _read, GEMMA_TENSORS)
