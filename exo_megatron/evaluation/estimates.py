"""Mean reward and sequence-level KL from samples, with standard errors over prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from exo_megatron.data.candidates import CandidateRecord

Values = NDArray[np.float64]

REFERENCE_NAME = "reference"
"""Name of the reference policy among the models of an evaluation."""


@dataclass(frozen=True)
class PromptMeans:
    """The rewards and KLs of one policy at P prompts: means of each prompt's samples.

    Attributes:
        rewards: [P] fp64.
        kls: [P] fp64, estimates of the sequence-level KL(pi_theta || pi_ref), in nats.
    """

    rewards: Values
    kls: Values

    @classmethod
    def of(cls, rewards: Iterable[float], kls: Iterable[float]) -> PromptMeans:
        """Make one of any numbers."""
        return cls(np.array(list(rewards), dtype=np.float64), np.array(list(kls), dtype=np.float64))


@dataclass(frozen=True)
class Estimate:
    """Estimates from the samples of one checkpoint.

    Attributes:
        reward: mean over prompts of the mean reward of a prompt's samples.
        kl: estimate of the sequence-level KL(pi_theta || pi_ref), in nats, at the sampling
            temperature.
        *_stderr: standard errors of these means.
        samples: number of samples per prompt.
        tokens: mean length of a sample, end-of-sequence included.
        finished: share of samples that ended by themselves.
    """

    name: str
    step: int | None
    reward: float
    reward_stderr: float
    kl: float
    kl_stderr: float
    prompts: int
    samples: int
    tokens: float
    finished: float


def average_samples(
    records: Sequence[CandidateRecord],
    policy_logprobs: Sequence[Sequence[float]],
    reference_logprobs: Sequence[Sequence[float]],
) -> PromptMeans:
    """Compute the means of rewards and log-ratios of each prompt's samples.

    The samples are drawn from the policy at the sampling temperature tau, so the mean of log
    pi_theta - log pi_ref is an unbiased estimate of their KL. With top-p below 1 it estimates the
    same mean under the truncated policy.

    Args:
        records: P prompts with M samples and rewards each.
        policy_logprobs: [P][M] sums over the tokens of each sample under softmax(logits / tau) of
            the policy, the distribution that the loss compares, too.
        reference_logprobs: [P][M], the same under the reference.
    """
    return PromptMeans.of(
        rewards=(fmean(record.rewards or ()) for record in records),
        kls=(
            fmean(p - q for p, q in zip(policy, reference, strict=True))
            for policy, reference in zip(policy_logprobs, reference_logprobs, strict=True)
        ),
    )


def estimate(name: str, step: int | None, records: Sequence[CandidateRecord], means: PromptMeans) -> Estimate:
    """Summarise scored samples of a policy at two or more prompts.

    Args:
        name: name of the policy.
        step: optimizer steps behind it; None for a converted model.
        records: P prompts with M samples each.
        means: result of `average_samples` for them.
    """
    candidates = [candidate for record in records for candidate in record.candidates]
    return Estimate(
        name=name,
        step=step,
        reward=float(means.rewards.mean()),
        reward_stderr=standard_error(means.rewards),
        kl=float(means.kls.mean()),
        kl_stderr=standard_error(means.kls),
        prompts=len(records),
        samples=len(records[0].candidates),
        tokens=fmean(len(candidate.token_ids) for candidate in candidates),
        finished=fmean(candidate.finished for candidate in candidates),
    )


def standard_error(values: Values) -> float:
    """Compute the standard error of the mean of two or more independent values."""
    return float(values.std(ddof=1)) / math.sqrt(len(values))
