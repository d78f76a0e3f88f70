"""Scored samples for the tests of this directory."""

from __future__ import annotations

from collections.abc import Sequence

from exo_megatron.data.candidates import Candidate, CandidateRecord
from exo_megatron.evaluation.estimates import Estimate


def record(name: str, rewards: Sequence[float], *, prompt: str = "the film", text: str = " ends .") -> CandidateRecord:
    """As many candidates as rewards; candidate k has k + 2 tokens, and the first one was cut off."""
    candidates = tuple(
        Candidate(f"{text}" if k == 0 else f"{text} ({k})", tuple(range(5, 7 + k)), k > 0, -2.0)
        for k in range(len(rewards))
    )
    return CandidateRecord(name, prompt, (1, 5, 6), candidates, tuple(rewards))


def point(name: str, step: int | None, reward: float, kl: float) -> Estimate:
    """An estimate with plausible errors."""
    return Estimate(name, step, reward, 0.08, kl, 0.05, prompts=8, samples=2, tokens=20.0, finished=0.9)
