"""Rotary frequencies against Hugging Face's, and angles by position id."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from exo_megatron.models.rotary import RotaryTable, _Turns, rotary_table
from exo_megatron.models.spec import Rotary, RotaryScaling

CPU = torch.device("cpu")
YARN = RotaryScaling(kind="yarn", factor=4.0, original_max_positions=32768, attention_factor=0.1 * math.log(4.0) + 1.0)
DIVISORS = tuple(1 + 0.05 * i for i in range(64))
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


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
        (YARN, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
        (
            YARN.model_copy(update={"truncate": False, "beta_fast": 16.0, "beta_slow": 2.0}),
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "truncate": False,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
        ),
        (
            RotaryScaling(
                kind="longrope",
                frequency_divisors=DIVISORS,
                attention_factor=math.sqrt(1 + math.log(32) / math.log(4096)),
            ),
            {
                "rope_type": "longrope",
                "short_factor": DIVISORS,
                "long_factor": [9.0] * 64,
                "factor": 32.0,
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
    ours = rotary_table(Rotary(base=base, dim=128, scaling=scaling), local=False, device=CPU)
    assert ours.attention_factor == pytest.approx(theirs.attention_scaling)
    torch.testing.assert_close(ours.frequencies, theirs.inv_freq, rtol=1e-6, atol=0.0)


def test_layers_with_a_window_may_have_another_base() -> None:
    rotary = Rotary(base=1e6, dim=8, scaling=RotaryScaling(kind="linear", factor=8.0), local_base=1e4)
    local = rotary_table(rotary, local=True, device=CPU)
    torch.testing.assert_close(local.frequencies, 1e4 ** -(torch.arange(0, 8, 2) / 8))
    torch.testing.assert_close(
        rotary_table(rotary, local=False, device=CPU).frequencies, 1e6 ** -(torch.arange(0, 8, 2) / 8) / 8
    )
    plain = rotary.model_copy(update={"local_base": None})
    assert torch.equal(
        rotary_table(plain, local=True, device=CPU).frequencies,
        rotary_table(plain, local=False, device=CPU).frequencies,
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_by_hand(interleaved: bool) -> None:
    """Pairs as complex numbers, turned by exp(i * position * frequency) and scaled; elements beyond `dim` stay."""
    frequencies = torch.tensor([1.0, 0.5])
    table = RotaryTable(frequencies, 1.25, interleaved)
    query = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 3, 3, 1])
    ours, key = table.rotate(query, query[:, :1], positions)
    first, second = ([0, 2], [1, 3]) if interleaved else ([0, 1], [2, 3])
    turns = torch.polar(torch.full((4, 2), 1.25), positions[:, None] * frequencies)[:, None]
    turned = torch.complex(query[..., first], query[..., second]) * turns
    torch.testing.assert_close(ours[..., first], turned.real)
    torch.testing.assert_close(ours[..., second], turned.imag)
    assert torch.equal(ours[..., 4:], query[..., 4:]) and torch.equal(key, ours[:, :1])


def test_turns_are_computed_once_for_the_positions_of_a_pass() -> None:
    """Of the same tensor with the same values; a change in place, other positions and another dtype give new ones."""
    table = RotaryTable(torch.tensor([1.0, 0.5]), 1.0, False)
    heads = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2])

    def fresh(heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return RotaryTable(table.frequencies, 1.0, False).rotate(heads, heads, positions)[0]

    def angles(call: Any) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
        return sum(event.count for event in profile.key_averages() if event.key == "aten::cos")

    assert angles(lambda: [table.rotate(heads, heads, positions) for _ in range(3)]) == 1
    positions += 5
    assert torch.equal(table.rotate(heads, heads, positions)[0], fresh(heads, positions))
    assert torch.equal(table.rotate(heads, heads, positions.flip(0))[0], fresh(heads, positions.flip(0)))
    half = heads.to(torch.bfloat16)
    assert torch.equal(table.rotate(half, half, positions)[0], fresh(half, positions))
    assert torch.equal(table.rotate(heads, heads, positions)[0], fresh(heads, positions))


def test_turns_are_forgotten_with_the_positions_of_their_pass() -> None:
    """Between passes a model keeps no memory of theirs, and of several passes only that of the latest."""
    table = RotaryTable(torch.tensor([1.0, 0.5]), 1.0, False)
    heads = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    passes = [torch.tensor([0, 1, 2]), torch.tensor([2, 3, 4])]

    def kept() -> int:
        gc.collect()
        return sum(type(each) is _Turns for each in gc.get_objects())

    before = kept()
    for positions in passes:
        table.rotate(heads, heads, positions)
        assert kept() == before + 1
    del positions
    passes.clear()
    assert kept() == before
