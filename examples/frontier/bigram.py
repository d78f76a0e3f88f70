"""A bigram language model of the texts: the next word depends on the last one, so every KL is exact.

pi_sft is a smoothed table of counts. A policy changes its logits by a tilt of the words, equal in all states, and by a
matrix of low rank; at rank 0 it cannot tell the states apart.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exo_megatron.evaluation.estimates import PromptMeans
from frontier.reviews import BEGIN, END, UNKNOWN, Reviews
from frontier.sweep import Groups, Run

TEMPERATURE = 0.8
SMOOTHING = 5.0
"""Draws from the unigrams that are added to each state's counts."""

LENGTH = 30
"""Words after which a text is cut."""

TRAIN_PROMPTS, TEST_PROMPTS = 3200, 4096
MOST_CANDIDATES = 32
NO_WORD = -1
FIRST_FACTOR = 0.3
"""Standard deviation of the first factor of a policy's matrix; the second begins at zero."""


@dataclass(frozen=True)
class Texts:
    """N texts: the word that each begins after, [N], and its words up to END, [N, LENGTH], then NO_WORD."""

    prompts: Tensor
    words: Tensor

    @property
    def whole(self) -> Tensor:
        """Prompts and words, [N, 1 + LENGTH]."""
        return torch.cat([self.prompts[:, None], self.words], dim=1)

    @property
    def states(self) -> Tensor:
        """The word before each word, [N, LENGTH]."""
        return self.whole[:, :-1].clamp(min=0)

    @property
    def present(self) -> Tensor:
        """Where there is a word, [N, LENGTH] bool."""
        return self.words != NO_WORD


def log_bigrams(reviews: Reviews) -> Tensor:
    """log pi_sft(word | last word) at TEMPERATURE, [V, V] fp64; it never says UNKNOWN or BEGIN."""
    size = len(reviews.words)
    counts = torch.zeros(size, size, dtype=torch.float64)
    for text in reviews.texts:
        ids = torch.tensor([*text, END])
        counts.index_put_((ids[:-1], ids[1:]), torch.ones(len(text), dtype=torch.float64), accumulate=True)
    unigrams = counts.sum(dim=0) / counts.sum()
    smooth = (counts + SMOOTHING * unigrams) / (counts.sum(dim=1, keepdim=True) + SMOOTHING)
    logits = smooth.clamp_min(1e-12).log() / TEMPERATURE
    logits[:, [UNKNOWN, BEGIN]] -= 30
    return logits.log_softmax(dim=-1)


def draw(log_probs: Tensor, prompts: Tensor, *, seed: int) -> Texts:
    """Draw one text after each prompt [N]. log_probs [V, V]."""
    size, count = len(log_probs), len(prompts)
    generator = torch.Generator().manual_seed(seed)
    # One ascending table: state s has its cumulative probabilities in (s, s + 1].
    table = log_probs.double().exp().cumsum(dim=-1).clamp(max=1.0)
    table[:, -1] = 1.0
    table = (table + torch.arange(size)[:, None]).reshape(-1)
    state, ended = prompts.clone(), torch.zeros(count, dtype=torch.bool)
    words = torch.full((count, LENGTH), NO_WORD)
    for place in range(LENGTH):
        uniform = torch.rand(count, dtype=torch.float64, generator=generator) * (1 - 1e-9)
        found = torch.searchsorted(table, uniform + state, right=True) - state * size
        found = found.clamp(0, size - 1)
        words[:, place] = torch.where(ended, NO_WORD, found)
        state = torch.where(ended, state, found)
        ended |= found == END
    return Texts(prompts, words)


def log_probs_of(log_probs: Tensor, texts: Texts) -> Tensor:
    """Log-probs of whole texts, [N] fp64; differentiable. log_probs [V, V]."""
    index = texts.states * len(log_probs) + texts.words.clamp(min=0)
    return torch.where(texts.present, log_probs.reshape(-1)[index].double(), 0.0).sum(dim=1)


def kl_of(log_probs: Tensor, reference: Tensor, texts: Texts) -> Tensor:
    """Sum over each text's states of the exact KL of the next word, [N] fp64.

    Its mean over texts of the policy is the KL of whole texts, with less noise than that of log-ratios.
    """
    log_probs = log_probs.double()
    by_state = (log_probs.exp() * (log_probs - reference)).sum(dim=-1)
    return torch.where(texts.present, by_state[texts.states], 0.0).sum(dim=1)


class BigramPolicy(torch.nn.Module):
    """pi_sft with changed logits: a tilt of all states, and a matrix of rank `rank`."""

    def __init__(self, reference: Tensor, *, rank: int, seed: int) -> None:
        super().__init__()
        size = len(reference)
        generator = torch.Generator().manual_seed(seed)
        self.reference = reference.float()
        self.tilt = torch.nn.Parameter(torch.zeros(size))
        self.first = torch.nn.Parameter(FIRST_FACTOR * torch.randn(size, rank, generator=generator))
        self.second = torch.nn.Parameter(torch.zeros(size, rank))

    def forward(self) -> Tensor:
        """log pi_theta(word | last word), [V, V]."""
        return (self.reference + self.tilt + self.first @ self.second.T).log_softmax(dim=-1)

    def trained(self) -> list[torch.nn.Parameter]:
        """See sweep.Policy."""
        return [self.tilt, self.first, self.second] if self.first.numel() else [self.tilt]


@dataclass(frozen=True)
class BigramWorld:
    """A bigram pi_sft, MOST_CANDIDATES candidates of each training prompt, and the test prompts."""

    reviews: Reviews
    reference: Tensor
    candidates: Texts
    groups: Groups
    test_prompts: Tensor

    @classmethod
    def of(cls, reviews: Reviews, *, seed: int) -> BigramWorld:
        """Draw the candidates. The test prompts are the same for every seed."""
        reference = log_bigrams(reviews)
        openings = [text[2] for text in reviews.texts if len(text) > 5 and text[2] > BEGIN]
        prompts = torch.tensor(random.Random(f"train {seed}").choices(openings, k=TRAIN_PROMPTS))
        candidates = draw(reference, prompts.repeat_interleave(MOST_CANDIDATES), seed=seed)
        groups = Groups(
            rewards=reviews.rewards(candidates.whole).view(TRAIN_PROMPTS, MOST_CANDIDATES),
            reference_logps=log_probs_of(reference, candidates).view(TRAIN_PROMPTS, MOST_CANDIDATES),
        )
        test = torch.tensor(random.Random("test").choices(openings, k=TEST_PROMPTS))
        return cls(reviews, reference, candidates, groups, test)

    def policy(self, run: Run) -> BigramPolicy:
        """See sweep.World."""
        return BigramPolicy(self.reference, rank=run.rank or 0, seed=run.seed)

    def logps(self, policies: Sequence[BigramPolicy], chosen: Tensor, K: int) -> Tensor:
        """See sweep.World."""
        numbers = (chosen[:, None] * MOST_CANDIDATES + torch.arange(K)).reshape(-1)
        texts = Texts(self.candidates.prompts[numbers], self.candidates.words[numbers])
        return torch.stack([log_probs_of(policy(), texts).view(len(chosen), K) for policy in policies])

    def evaluate(self, policy: BigramPolicy) -> PromptMeans:
        """See sweep.World: one text at each test prompt."""
        log_probs = policy()
        texts = draw(log_probs, self.test_prompts, seed=1 << 20)
        kls = kl_of(log_probs, self.reference, texts)
        return PromptMeans(self.reviews.rewards(texts.whole).numpy(), kls.numpy())
