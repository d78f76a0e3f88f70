"""Mean reward and sequence-level KL from samples, with standard errors over prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from exo_megatron.data.candidates import CandidateRecord

REFERENCE_NAME = "reference"
"""Name of the reference policy among the models of an evaluation."""


@dataclass(frozen=True)
class Estimate:
    """What the samples of one checkpoint say.

    reward: mean over prompts of the mean reward of a prompt's samples. kl: estimate of KL(pi_theta || pi_ref) of
    whole completions, in nats, at the sampling temperature. *_stderr: standard errors of these means. samples: per
    prompt. tokens: mean length of a sample, end-of-sequence included. finished: share of samples that ended by
    themselves.
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


def estimate(
    name: str,
    step: int | None,
    records: Sequence[CandidateRecord],
    policy_logprobs: Sequence[Sequence[float]],
    reference_logprobs: Sequence[Sequence[float]],
) -> Estimate:
    """Summarise scored samples of a policy at two or more prompts.

    records: P prompts with M samples and rewards each. policy_logprobs, reference_logprobs: [P][M] sums over the
    tokens of each sample under softmax(logits / tau) of either policy, tau being the sampling temperature: the
    distributions that the loss compares, too. As the samples are drawn from the policy at tau, the mean of
    log pi_theta - log pi_ref is an unbiased estimate of their KL (with top-p below 1, of the KL-like mean under the
    truncated policy).
    """
    rewards = [fmean(record.rewards or ()) for record in records]
    kls = [
        fmean(p - q for p, q in zip(policy, reference, strict=True))
        for policy, reference in zip(policy_logprobs, reference_logprobs, strict=True)
    ]
    candidates = [candidate for record in records for candidate in record.candidates]
    return Estimate(
        name=name,
        step=step,
        reward=fmean(rewards),
        reward_stderr=standard_error(rewards),
        kl=fmean(kls),
        kl_stderr=standard_error(kls),
        prompts=len(records),
        samples=len(records[0].candidates),
        tokens=fmean(len(candidate.token_ids) for candidate in candidates),
        finished=fmean(candidate.finished for candidate in candidates),
    )


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of two or more independent values."""
    return stdev(values) / math.sqrt(len(values))
