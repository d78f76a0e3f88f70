"""What a Llama config.json says becomes the ModelSpec; what cannot be expressed is refused by key."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from exo_megatron.conversion.families import find_family
from exo_megatron.errors import CheckpointError
from exo_megatron.models.spec import ModelSpec, Rotary, RotaryScaling

WHERE = "hf/config.json"
SIZES = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_SCALING = RotaryScaling(
    kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
)


def read(**changes: Any) -> ModelSpec:
    values = SIZES | changes
    return find_family(values, WHERE).read_config(values, WHERE)


def test_defaults_are_those_of_transformers() -> None:
    assert read() == read(**LlamaConfig(**SIZES).to_dict() | {"architectures": ["LlamaForCausalLM"]})
    assert read() == ModelSpec(
        family="llama",
        layers=3,
        hidden_size=32,
        ffn_hidden_size=48,
        heads=4,
        kv_heads=4,
        head_dim=8,
        vocab_size=101,
        max_positions=2048,
        norm_epsilon=1e-6,
        rotary=Rotary(base=10000.0, dim=8),
    )


def test_every_key_counts() -> None:
    spec = read(
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
    )
    assert (spec.kv_heads, spec.head_dim, spec.max_positions, spec.norm_epsilon) == (2, 16, 64, 1e-5)
    assert (spec.tied_embeddings, spec.qkv_bias, spec.linear_bias) == (True, True, True)


@pytest.mark.parametrize(
    ("rope", "base", "scaling"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, RotaryScaling(kind="linear", factor=2.0)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}}, 5e5, LLAMA3_SCALING),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}}, 5e5,
         RotaryScaling(kind="linear", factor=4.0)),
        ({"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}}, 5e5, LLAMA3_SCALING),
        ({"rope_parameters": LLAMA3 | {"rope_type": "llama3"}, "rope_theta": 5e5}, 5e5, LLAMA3_SCALING),
    ],
)  # fmt: skip
def test_rotary_of_transformers_4_and_5(rope: dict[str, Any], base: float, scaling: RotaryScaling | None) -> None:
    spec = read(**rope)
    assert spec.rotary == Rotary(base=base, dim=8, scaling=scaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; expected model_type: one of llama"),
        ({"model_type": None}, "model_type is None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is .*one of LlamaForCausalLM"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected hidden_act: 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"attention_bias": True}, r"attention_bias is True.*the same as mlp_bias \(False\)"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3.*divisor of the 4"),
        ({"hidden_size": 34}, "num_attention_heads is 4.*divisor of hidden_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected num_hidden_layers: a positive whole number"),
        ({"vocab_size": "101"}, "vocab_size is '101'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; expected tie_word_embeddings: true or false"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling: type is 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'; expected .* default, linear or"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected rope_scaling: a mapping"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(**changes)
    assert caught.value.where.startswith(WHERE)


def test_missing_key_is_called_missing() -> None:
    values = {key: value for key, value in SIZES.items() if key != "hidden_size"}
    with pytest.raises(CheckpointError, match="hidden_size is missing"):
        find_family(values, WHERE).read_config(values, WHERE)
