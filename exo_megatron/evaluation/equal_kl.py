"""Comparison of policies at equal KL to the reference, with errors by bootstrap over prompts.

A method leaves policies at several distances from the reference: its checkpoints, or the ends of
runs with different settings. Its curve is their reward over the square root of their KL, linear
between neighbours: near the reference, reward grows with that root (arXiv 2210.10760, Section 3). A
bootstrap draws prompts with replacement, the same ones for every policy, and draws the curves
again; so what two policies share at a prompt does not count as an error of their difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exo_megatron.evaluation.estimates import PromptMeans, Values

RESAMPLES = 1000
COVERAGE = 95
"""Per cent of the bootstrap's values that an interval holds."""


Curve = Sequence[PromptMeans]
"""One or more policies of a method, in any order, at the same prompts."""


@dataclass(frozen=True)
class Bounded:
    """An estimate with its standard error and the limits of its interval of COVERAGE per cent."""

    value: float
    stderr: float
    low: float
    high: float

    def __neg__(self) -> Bounded:
        return Bounded(-self.value, self.stderr, -self.high, -self.low)

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below zero, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def spans(curve: Curve, kl: float) -> bool:
    """Tell whether the curve has policies at or below this KL and at or above it."""
    kls = [float(policy.kls.mean()) for policy in curve]
    return min(kls) <= kl <= max(kls)


def read_curve(curve: Curve, kl: float) -> float:
    """Read the reward of a curve at a KL, without an error. Raises ValueError beyond its ends."""
    _check_spans(curve, kl)
    kls = np.array([[policy.kls.mean() for policy in curve]])
    rewards = np.array([[policy.rewards.mean() for policy in curve]])
    return float(_interpolate(kls, rewards, np.array([kl]))[0])


def reward_at_kl(curve: Curve, kl: float, *, seed: int = 0) -> Bounded:
    """Estimate the reward of a curve at a KL that it spans. Raises ValueError beyond its ends."""
    _check_spans(curve, kl)
    kls, rewards = _resample(curve, seed)
    return _bounded(_interpolate(kls, rewards, np.full(len(kls), kl)))


def lead_at_kl(first: Curve, second: Curve, kl: float, *, seed: int = 0) -> Bounded:
    """Estimate by how much the first curve's reward exceeds the second's at a KL that both span.

    Raises ValueError beyond the ends of either.
    """
    _check_spans(first, kl)
    _check_spans(second, kl)
    kls, rewards = _resample([*first, *second], seed)
    at, cut = np.full(len(kls), kl), len(first)
    return _bounded(_interpolate(kls[:, :cut], rewards[:, :cut], at) - _interpolate(kls[:, cut:], rewards[:, cut:], at))


def lead_over(curve: Curve, policy: PromptMeans, *, seed: int = 0) -> Bounded:
    """Estimate by how much the curve's reward exceeds a policy's, at the KL of that policy.

    The policy's reward is not interpolated. Raises ValueError if the curve does not span its KL.
    """
    _check_spans(curve, float(policy.kls.mean()))
    kls, rewards = _resample([*curve, policy], seed)
    return _bounded(_interpolate(kls[:, :-1], rewards[:, :-1], kls[:, -1]) - rewards[:, -1])


def lead_of(first: PromptMeans, second: PromptMeans, *, seed: int = 0) -> tuple[Bounded, Bounded]:
    """Estimate by how much the first policy exceeds the second in reward, and in KL."""
    kls, rewards = _resample([first, second], seed)
    return _bounded(rewards[:, 0] - rewards[:, 1]), _bounded(kls[:, 0] - kls[:, 1])


def _check_spans(curve: Curve, kl: float) -> None:
    if not spans(curve, kl):
        kls = sorted(float(policy.kls.mean()) for policy in curve)
        raise ValueError(f"KL {kl:.4g} is beyond the ends of the curve, {kls[0]:.4g} and {kls[-1]:.4g}")


def _resample(policies: Curve, seed: int) -> tuple[Values, Values]:
    """Compute the means of KLs and rewards over all prompts (first line) and over resampled ones.

    Returns two arrays [1 + RESAMPLES, policies]. The same prompts are drawn for every policy, and
    for every call with this number of prompts and seed.
    """
    values = np.stack([*(policy.kls for policy in policies), *(policy.rewards for policy in policies)])
    prompts = values.shape[1]
    generator = np.random.default_rng(seed)
    means = [values.mean(axis=1)]
    for _ in range(RESAMPLES):
        counts = np.bincount(generator.integers(prompts, size=prompts), minlength=prompts)
        means.append(values @ counts / prompts)
    kls, rewards = np.hsplit(np.stack(means), 2)
    return kls, rewards


def _interpolate(kls: Values, rewards: Values, at: Values) -> Values:
    """Read the reward of each line's curve at the KL of that line, [lines].

    A resampled curve may end a little before the KL; it counts with the reward of its end then.
    """
    order = kls.argsort(axis=1)
    kls, rewards = np.take_along_axis(kls, order, axis=1), np.take_along_axis(rewards, order, axis=1)
    roots, levels = (np.sqrt(np.maximum(values, 0.0)) for values in (kls, at))  # an estimate may be below zero
    return np.array([np.interp(*line) for line in zip(levels, roots, rewards, strict=True)], dtype=np.float64)


def _bounded(values: Values) -> Bounded:
    """Describe an estimate (first value) by its resamples."""
    resamples = values[1:]
    low, high = np.percentile(resamples, [50 - COVERAGE / 2, 50 + COVERAGE / 2])
    return Bounded(float(values[0]), float(resamples.std(ddof=1)), float(low), float(high))
