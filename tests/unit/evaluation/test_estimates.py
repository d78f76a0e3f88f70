"""Means and standard errors by hand, and the estimate of KL on distributions whose KL is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from exo_megatron.evaluation.estimates import Estimate, average_samples, estimate, standard_error
from tests.unit.evaluation.records import record


def test_two_prompts_by_hand() -> None:
    records = [record("a", [1.0, 3.0]), record("b", [6.0, 6.0])]
    policy = [[-1.0, -2.0], [-3.0, -4.0]]
    reference = [[-2.0, -5.0], [-3.0, -4.0]]
    found = estimate("exo", 12, records, average_samples(records, policy, reference))
    # Prompt means 2 and 6 (rewards), (1 + 3) / 2 = 2 and 0 (log-ratios); s.e. of two values is half their distance.
    assert found == Estimate(
        name="exo",
        step=12,
        reward=4.0,
        reward_stderr=pytest.approx(2.0),
        kl=1.0,
        kl_stderr=pytest.approx(1.0),
        prompts=2,
        samples=2,
        tokens=2.5,
        finished=0.5,
    )


def test_samples_of_one_prompt_do_not_shrink_the_error_of_the_prompts() -> None:
    """Four equal samples of a prompt are worth one."""
    once, often = (
        average_samples([record(str(r), [r] * m) for r in (0.0, 1.0, 5.0)], [[0.0] * m] * 3, [[0.0] * m] * 3)
        for m in (1, 4)
    )
    assert standard_error(often.rewards) == standard_error(once.rewards) == pytest.approx(math.sqrt(7 / 3))


def test_standard_error_of_ten_values() -> None:
    values = np.random.default_rng(0).normal(size=10)
    assert standard_error(values) == pytest.approx(values.std(ddof=1) / math.sqrt(10))


def test_kl_of_known_distributions() -> None:
    """log p - log q over draws from p: the mean is KL(p || q), not KL(q || p), within four standard errors."""
    generator = np.random.default_rng(3)
    p, q = np.array([0.9, 0.05, 0.05]), np.array([0.4, 0.3, 0.3])
    draws = generator.choice(3, size=(5000, 2), p=p)
    records = [record(str(i), [0.0, 0.0]) for i in range(len(draws))]
    means = average_samples(records, np.log(p)[draws].tolist(), np.log(q)[draws].tolist())
    found = estimate("m", None, records, means)
    forward, backward = float((p * np.log(p / q)).sum()), float((q * np.log(q / p)).sum())
    assert abs(found.kl - forward) < 4 * found.kl_stderr < abs(forward - backward)
