"""Rotary frequencies against Hugging Face's, and angles by position id."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from exo_megatron.models.rotary import inverse_frequencies, rotary_angles
from exo_megatron.models.spec import ModelSpec, RotaryScaling

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def spec(base: float, scaling: RotaryScaling | None) -> ModelSpec:
    return ModelSpec(
        family="llama",
        layers=2,
        hidden_size=512,
        ffn_hidden_size=1024,
        heads=4,
        kv_heads=2,
        head_dim=128,
        vocab_size=101,
        max_positions=131072,
        norm_epsilon=1e-5,
        rotary_base=base,
        rotary_scaling=scaling,
    )


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize(
    ("scaling", "parameters"),
    [
        (None, {"rope_type": "default"}),
        (RotaryScaling(kind="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (RotaryScaling(kind="llama3", factor=8.0, original_max_positions=8192), LLAMA3),
        (
            RotaryScaling(
                kind="llama3", factor=32.0, low_freq_factor=2.0, high_freq_factor=8.0, original_max_positions=4096
            ),
            LLAMA3
            | {
                "factor": 32.0,
                "low_freq_factor": 2.0,
                "high_freq_factor": 8.0,
                "original_max_position_embeddings": 4096,
            },
        ),
    ],
)
def test_frequencies(base: float, scaling: RotaryScaling | None, parameters: dict[str, Any]) -> None:
    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": base, **parameters},
    )
    theirs = LlamaRotaryEmbedding(config)
    assert theirs.attention_scaling == 1.0
    torch.testing.assert_close(inverse_frequencies(spec(base, scaling), CPU), theirs.inv_freq, rtol=1e-6, atol=0.0)


def test_angles_follow_position_ids_not_rows() -> None:
    frequencies = torch.tensor([1.0, 0.5])
    angles = rotary_angles(torch.tensor([0, 3, 3, 1]), frequencies)
    assert angles.shape == (4, 1, 1, 4) and angles.dtype == torch.float32
    assert angles[:, 0, 0].tolist() == [[0.0] * 4, [3.0, 1.5] * 2, [3.0, 1.5] * 2, [1.0, 0.5] * 2]
