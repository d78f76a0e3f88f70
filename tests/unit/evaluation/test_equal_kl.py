"""Differences at equal KL: by hand, and as often wrong as their intervals say."""

from __future__ import annotations

import numpy as np
import pytest

from exo_megatron.evaluation.equal_kl import (
    COVERAGE,
    Bounded,
    lead_at_kl,
    lead_of,
    lead_over,
    read_curve,
    reward_at_kl,
    spans,
)
from exo_megatron.evaluation.estimates import PromptMeans

PROMPTS = 400


def policy(reward: float, kl: float, *, seed: int, noise: float = 1.0) -> PromptMeans:
    """Rewards and KLs of PROMPTS prompts around these means."""
    generator = np.random.default_rng(seed)
    rewards, kls = generator.normal(size=(2, PROMPTS)) * [[noise], [noise / 4]]
    return PromptMeans(reward + rewards, kl + kls)


def constant(reward: float, kl: float) -> PromptMeans:
    return PromptMeans.of([reward] * PROMPTS, [kl] * PROMPTS)


def test_interpolation_by_hand() -> None:
    """Whatever the order of the policies."""
    curve = [constant(3.0, 4.0), constant(0.0, 0.0), constant(1.0, 1.0)]
    assert reward_at_kl(curve, 2.25) == Bounded(2.0, 0.0, 2.0, 2.0)  # half-way between the roots of 1 and 4
    assert reward_at_kl(curve, 4.0).value == read_curve(curve, 4.0) == 3.0
    assert read_curve(curve, 2.25) == 2.0
    other = [constant(1.0, 1.0), constant(2.0, 9.0)]
    assert lead_at_kl(curve, other, 2.25).value == pytest.approx(2.0 - 1.25)
    assert lead_over(curve, constant(0.5, 2.25)).value == pytest.approx(1.5)
    reward, kl = lead_of(curve[0], other[1])
    assert (reward.value, kl.value) == (1.0, -5.0)
    assert -Bounded(1.0, 0.5, 0.25, 2.0) == Bounded(-1.0, 0.5, -2.0, -0.25)


def test_beyond_the_ends_there_is_no_answer() -> None:
    curve = [constant(0.0, 0.5), constant(1.0, 1.5)]
    assert [spans(curve, kl) for kl in (0.4, 0.5, 1.0, 1.5, 1.6)] == [False, True, True, True, False]
    for refused in (
        lambda: reward_at_kl(curve, 1.6),
        lambda: read_curve(curve, 1.6),
        lambda: lead_at_kl([constant(0.0, 0.0), constant(0.0, 9.0)], curve, 0.4),
        lambda: lead_over(curve, constant(0.0, 2.0)),
    ):
        with pytest.raises(ValueError, match=r"beyond the ends of the curve, 0\.5 and 1\.5"):
            refused()


def test_standard_error_is_that_of_the_mean() -> None:
    """Far from the curve's bends, reward at KL k has the error of r - slope * k / (2 sqrt(k)), here with slope 10."""
    curve = [policy(0.0, 20.0, seed=1), policy(10.0, 20.0 + 1 + 2 * 20.0**0.5, seed=1)]
    residual = curve[0].rewards - 10 * curve[0].kls / (2 * 22.6**0.5)
    assert reward_at_kl(curve, 24.7).stderr == pytest.approx(residual.std(ddof=1) / PROMPTS**0.5, rel=0.1)


def test_shared_noise_cancels() -> None:
    """Policies that get the same reward at every prompt but for a constant differ by exactly that."""
    one = policy(1.0, 1.0, seed=2)
    other = PromptMeans(one.rewards + 0.25, one.kls)
    reward, kl = lead_of(other, one)
    assert reward.value == pytest.approx(0.25)
    assert max(reward.stderr, kl.stderr) < 1e-12


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Two noisy curves whose true lead at KL 1 is 0.3."""
    trials, held = 120, 0
    for trial in range(trials):
        first = [policy(0.3, 0.2, seed=4 * trial), policy(2.3, 2.0, seed=4 * trial + 1)]
        second = [policy(0.0, 0.2, seed=4 * trial + 2), policy(2.0, 2.0, seed=4 * trial + 3)]
        lead = lead_at_kl(first, second, 1.0, seed=trial)
        held += lead.low <= 0.3 <= lead.high
    expected = trials * COVERAGE / 100
    assert abs(held - expected) < 4 * (expected * (1 - COVERAGE / 100)) ** 0.5


@pytest.mark.parametrize(("low", "high", "sign"), [(0.1, 0.3, 1), (-0.1, 0.3, 0), (-0.3, -0.1, -1), (0.0, 0.1, 0)])
def test_sign_needs_the_whole_interval(low: float, high: float, sign: int) -> None:
    assert Bounded((low + high) / 2, 0.1, low, high).sign == sign
