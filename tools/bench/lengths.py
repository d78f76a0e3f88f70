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
import statistics
from dataclasses import dataclass

from exo_megatron.diagnosis.work import Lengths

LONGEST = 512


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

    def spread(self, groups: int, candidates: int) -> list[Lengths]:
        """Give few groups whose lengths are spread as the distribution is, and have its means.

        They are its quantiles, in random order: a step of a few groups then stands for many.
        """
        generator = random.Random(f"{self.name} {groups} {candidates}")
        prompts = _quantiles(groups, *self.prompt, generator)
        answers = _quantiles(groups * candidates, *self.candidate, generator)
        return [Lengths(prompts[i], tuple(answers[i * candidates : (i + 1) * candidates])) for i in range(groups)]


def _quantiles(count: int, mean: float, deviation: float, generator: random.Random) -> list[int]:
    """Give the quantiles (i + 1/2) / count of a log-normal distribution, cut and scaled to its mean."""
    normal = statistics.NormalDist()
    raw = [math.exp(deviation * normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    scale = mean * count / sum(raw)
    for _ in range(20):  # what is cut off goes to the others
        values = [min(value * scale, LONGEST) for value in raw]
        scale *= mean * count / sum(values)
    lengths = [max(4, round(value)) for value in values]
    generator.shuffle(lengths)
    return lengths


def _log_normal(generator: random.Random, mean: float, deviation: float) -> int:
    location = math.log(mean) - deviation**2 / 2
    return min(max(4, round(math.exp(generator.gauss(location, deviation)))), LONGEST)


HH = Distribution("HH-like", prompt=(47, 0.8), candidate=(230, 0.6))
TLDR = Distribution("TL;DR-like", prompt=(400, 0.35), candidate=(50, 0.4))
