"""Lengths of prompts and candidates that benchmarks use, in tokens.

Lengths of real texts are about log-normal. HH-like: short questions and long answers, mean 47 and
230 tokens. TL;DR-like: posts and their summaries, mean 400 and 50. The standard deviation of the
logarithm is 0.8 for prompts and 0.6 for answers of HH (0.86 and 0.89 were measured on HH-RLHF's
harmless dialogues), 0.35 and 0.4 for TL;DR, whose posts and summaries are more alike. Prompts and
candidates are cut at 512 tokens each, the defaults of `data`.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

LONGEST = 512


@dataclass(frozen=True)
class Lengths:
    """Lengths of prompt and candidates of one group, in tokens."""

    prompt: int
    candidates: tuple[int, ...]


@dataclass(frozen=True)
class Distribution:
    """Mean length in tokens and standard deviation of its logarithm, of prompts and of
    candidates.
    """

    name: str
    prompt: tuple[float, float]
    candidate: tuple[float, float]

    def draw(self, groups: int, candidates: int, *, seed: int = 0) -> list[Lengths]:
        """Draw lengths; the same list for the same arguments."""
        generator = random.Random(f"{self.name} {candidates} {seed}")
        drawn = []
        for _ in range(groups):
            prompt = _log_normal(generator, *self.prompt)
            drawn.append(Lengths(prompt, tuple(_log_normal(generator, *self.candidate) for _ in range(candidates))))
        return drawn


def _log_normal(generator: random.Random, mean: float, deviation: float) -> int:
    location = math.log(mean) - deviation**2 / 2
    return min(max(4, round(math.exp(generator.gauss(location, deviation)))), LONGEST)


HH = Distribution("HH-like", prompt=(47, 0.8), candidate=(230, 0.6))
TLDR = Distribution("TL;DR-like", prompt=(400, 0.35), candidate=(50, 0.4))
