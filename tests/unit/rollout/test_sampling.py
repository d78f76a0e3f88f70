"""Uniform numbers and the choice of the next token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from exo_megatron.config.sections import SamplingConfig
from exo_megatron.rollout import sampling
from exo_megatron.rollout.sampling import draw_tokens, philox4x32, uniforms


def words(*values: int):
    return tuple(np.array([value], dtype=np.uint64) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's known answers (kat_vectors, philox4x32 10)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected) -> None:
    assert tuple(int(word[0]) for word in philox4x32(words(*counter), key)) == expected


def test_uniforms_do_not_depend_on_how_many_are_asked_for() -> None:
    table = uniforms(7, "p3", candidates=8, steps=40)
    assert np.array_equal(uniforms(7, "p3", candidates=3, steps=11), table[:3, :11])


def test_uniforms_are_uniform_and_independent() -> None:
    table = np.stack([uniforms(seed, f"prompt {i}", candidates=8, steps=64) for seed in (0, 1) for i in range(40)])
    assert table.min() >= 0.0 and table.max() < 1.0
    flat = table.ravel()
    assert len(np.unique(flat)) == flat.size
    count = flat.size
    histogram = np.bincount((flat * 64).astype(int), minlength=64)
    chi2 = ((histogram - count / 64) ** 2 / (count / 64)).sum()
    assert 63 - 5 * math.sqrt(126) < chi2 < 63 + 5 * math.sqrt(126)
    centred = table - 0.5
    # Neighbours along seeds and prompts, candidates, and steps are uncorrelated: 12 * covariance ~ N(0, 1/n).
    for axis in range(3):
        first = np.take(centred, range(centred.shape[axis] - 1), axis)
        second = np.take(centred, range(1, centred.shape[axis]), axis)
        assert abs(12 * (first * second).mean()) < 5 / math.sqrt(first.size)


def numpy_draw(logits: np.ndarray, uniform: float, temperature: float, top_p: float) -> tuple[int, float]:
    """The definition, a token at a time."""
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    kept: set[int] = set()
    mass = 0.0
    for token in sorted(range(len(logits)), key=lambda t: (-probabilities[t], t)):
        if mass >= top_p:
            break
        kept.add(token)
        mass += probabilities[token]
    reached = 0.0
    for token in range(len(logits)):
        reached += probabilities[token] / mass if token in kept else 0.0
        if token in kept and reached > uniform:
            return token, math.log(probabilities[token])
    raise AssertionError("the uniform number is beyond the last token")


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_follow_the_definition(temperature: float, top_p: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(20, 37, generator=generator) * 3
    before = logits.clone()
    places = torch.arange(200) % 20
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    tokens, logprobs = draw_tokens(logits, places, uniform, SamplingConfig(temperature=temperature, top_p=top_p))
    assert torch.equal(logits, before)
    for draw in range(200):
        token, logprob = numpy_draw(logits[places[draw]].numpy(), uniform[draw].item(), temperature, top_p)
        assert tokens[draw].item() == token
        assert logprobs[draw].item() == pytest.approx(logprob, rel=1e-12)
    if top_p == 1e-6:
        assert torch.equal(tokens, logits[places].argmax(-1))


def test_top_p_keeps_the_smallest_set_of_that_mass() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    uniform = torch.linspace(0, 1 - 1e-9, 1001, dtype=torch.float64)
    tokens, logprobs = draw_tokens(
        logits, torch.zeros(1001, dtype=torch.int64), uniform, SamplingConfig(temperature=1.0, top_p=0.65)
    )
    shares = torch.bincount(tokens, minlength=4) / 1001
    # 0.4 alone is short of 0.65, 0.4 + 0.3 is not: vocabulary order, renormalised to 4/7 and 3/7.
    torch.testing.assert_close(shares, torch.tensor([0.0, 4 / 7, 0.0, 3 / 7]), atol=2e-3, rtol=0)
    assert logprobs[0].item() == pytest.approx(math.log(0.4), abs=1e-6)


def test_ties_at_the_edge_of_top_p_go_to_the_lower_id() -> None:
    uniform = torch.tensor([0.0, 0.5, 0.999999], dtype=torch.float64)
    tokens, _ = draw_tokens(
        torch.zeros(1, 4), torch.zeros(3, dtype=torch.int64), uniform, SamplingConfig(temperature=1.0, top_p=0.5)
    )
    assert tokens.tolist() == [0, 1, 1]


def test_extreme_uniforms_and_vanishing_tokens() -> None:
    logits = torch.tensor([[-1000.0, 0.0, 1.0, -1000.0]])
    uniform = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    tokens, _ = draw_tokens(logits, torch.tensor([0, 0]), uniform, SamplingConfig(temperature=1.0, top_p=1.0))
    assert tokens.tolist() == [1, 2]


def test_chunks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 50, generator=generator)
    uniform = torch.rand(9, generator=generator, dtype=torch.float64)
    whole = draw_tokens(logits, torch.arange(9), uniform, SamplingConfig(temperature=0.7, top_p=0.8))
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", 100)
    chunked = draw_tokens(logits, torch.arange(9), uniform, SamplingConfig(temperature=0.7, top_p=0.8))
    assert torch.equal(whole[0], chunked[0])
    torch.testing.assert_close(whole[1], chunked[1], rtol=1e-14, atol=0)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_absent_ids_are_never_drawn(top_p: float) -> None:
    """The others keep their proportions, and log-probs are those of the whole vocabulary."""
    logits = torch.tensor([[0.5, 9.0, -1.0, 0.1, 2000.0], [0.0, 1.0, 0.2, 0.3, 0.4]])
    places, absent = torch.arange(2).repeat_interleave(4000), torch.tensor([1, 4])
    uniform = torch.linspace(0, 1 - 2**-53, 4000, dtype=torch.float64).repeat(2)
    sampling = SamplingConfig(temperature=0.8, top_p=top_p)
    tokens, logprobs = draw_tokens(logits, places, uniform, sampling, absent)
    expected, _ = draw_tokens(logits.index_fill(1, absent, -torch.inf), places, uniform, sampling)
    assert torch.equal(tokens, expected) and not torch.isin(tokens, absent).any()
    whole = (logits.double() / 0.8).log_softmax(-1)
    assert logprobs.numpy() == pytest.approx(whole[places, tokens].numpy(), rel=1e-12)
    assert (
        len(tokens[:4000].unique()) > 1 and torch.isin(draw_tokens(logits, places, uniform, sampling)[0], absent).any()
    )
