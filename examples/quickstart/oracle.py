"""The sentiment oracle: log-odds that a review is positive, by logistic regression on its words and word pairs.

As in the paper's controlled experiment, rewards come from a classifier fitted on the labels, so that the true
reward of every sample is known. Fitting uses torch; scoring is plain Python.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

WEIGHTS_VARIABLE = "QUICKSTART_ORACLE"
"""Environment variable that names the fitted oracle's file."""

PENALTY = 3e-4
"""L2 penalty on the weights, relative to the mean log-loss."""

STEPS = 300


@dataclass(frozen=True)
class Oracle:
    """Weights of a linear model on the set of words and adjacent word pairs of a text."""

    weights: dict[str, float]
    bias: float

    def log_odds(self, text: str) -> float:
        """log p(positive) - log p(negative)."""
        return self.bias + sum(self.weights.get(feature, 0.0) for feature in sorted(features(text)))

    def accuracy(self, texts: Sequence[str], labels: Sequence[int]) -> float:
        """Share of texts on the right side of zero."""
        return sum((self.log_odds(t) > 0) == bool(label) for t, label in zip(texts, labels, strict=True)) / len(texts)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps({"bias": self.bias, "weights": self.weights}), encoding="utf-8")


def features(text: str) -> set[str]:
    """Words of `text` and its pairs of neighbouring words."""
    words = text.split()
    return {*words, *(f"{first} {second}" for first, second in pairwise(words))}


def fit_oracle(texts: Sequence[str], labels: Sequence[int]) -> Oracle:
    """Logistic regression on features that occur in at least two texts; deterministic."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    found = [sorted(features(text)) for text in texts]
    counts = Counter(feature for row in found for feature in row)
    names = sorted(feature for feature, count in counts.items() if count > 1)
    index = {name: i for i, name in enumerate(names)}
    pairs = [(row, index[f]) for row, present in enumerate(found) for f in present if f in index]
    rows, columns = torch.tensor(pairs, dtype=torch.int64).T
    target = torch.tensor(labels, dtype=torch.float32)
    weights = torch.zeros(len(names), requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([weights, bias], lr=0.1)
    for _ in range(STEPS):
        logits = bias.expand(len(texts)).index_add(0, rows, weights[columns])
        loss = binary_cross_entropy_with_logits(logits, target) + PENALTY * weights.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Oracle(dict(zip(names, weights.tolist(), strict=True)), bias.item())


@cache
def load_oracle(path: Path) -> Oracle:
    """Read what `Oracle.save` wrote."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    return Oracle(stored["weights"], stored["bias"])


def score(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Reward function for `exo-megatron score`: the log-odds of each whole text, prompt and completion."""
    oracle = load_oracle(Path(os.environ[WEIGHTS_VARIABLE]))
    return [oracle.log_odds(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]
