"""The candidate group, with rewards and reference log-probs; and the groups of each step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")

FURTHER_DIGESTED = ("log_weights", "reference_token_logprobs", "behaviour_token_logprobs")
"""Fields that the `data_digest` names where a group has them."""


@dataclass(frozen=True)
class Group:
    """One prompt and its K >= 1 candidates, as token ids that are fixed when the data is read.

    Attributes:
        prompt: P >= 1 token ids.
        candidates: K tuples of R_k >= 1 ids, end-of-sequence included if the candidate ended by
            itself. For preference data candidate 0 is the chosen one.
        rewards: K rewards, or None.
        reference_logprobs: K log-probs of the reference, or None. Each is the sum over the
            candidate's tokens, in nats, at the temperature of the loss.
        log_weights: K logarithms of importance weights, for losses that need them.
        reference_token_logprobs: log-probs of every token under the reference, R_k for each
            candidate, for losses that need them.
        behaviour_token_logprobs: the same under the behaviour policy, which drew the candidates.
    """

    id: str
    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    rewards: tuple[float, ...] | None = None
    reference_logprobs: tuple[float, ...] | None = None
    log_weights: tuple[float, ...] | None = None
    reference_token_logprobs: tuple[tuple[float, ...], ...] | None = None
    behaviour_token_logprobs: tuple[tuple[float, ...], ...] | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the group occupies in a micro-batch: P + R_1 + ... + R_K."""
        return len(self.prompt) + sum(len(candidate) for candidate in self.candidates)

    def take(self, numbers: Sequence[int]) -> Group:
        """Take only the candidates with these numbers, in this order, with all their values."""
        return Group(
            self.id,
            self.prompt,
            tuple(self.candidates[k] for k in numbers),
            rewards=_taken(self.rewards, numbers),
            reference_logprobs=_taken(self.reference_logprobs, numbers),
            log_weights=_taken(self.log_weights, numbers),
            reference_token_logprobs=_taken(self.reference_token_logprobs, numbers),
            behaviour_token_logprobs=_taken(self.behaviour_token_logprobs, numbers),
        )


def _taken(values: tuple[T, ...] | None, numbers: Sequence[int]) -> tuple[T, ...] | None:
    return None if values is None else tuple(values[k] for k in numbers)


@dataclass(frozen=True)
class GroupLengths:
    """Numbers of tokens of G groups with C candidates in all.

    Attributes:
        prompts: P of every group, [G] int64.
        counts: K of every group, [G] int64.
        candidates: R of every candidate, group after group, [C] int64.
    """

    prompts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    candidates: npt.NDArray[np.int64]

    @classmethod
    def of(cls, groups: Sequence[Group]) -> GroupLengths:
        """Count the tokens of groups."""
        return cls(
            np.array([len(group.prompt) for group in groups], dtype=np.int64),
            np.array([len(group.candidates) for group in groups], dtype=np.int64),
            np.array([len(each) for group in groups for each in group.candidates], dtype=np.int64),
        )

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """P + R_1 + ... + R_K of every group, [G]."""
        return self.prompts + np.add.reduceat(self.candidates, self.starts[:-1])

    @property
    def longest(self) -> npt.NDArray[np.int64]:
        """P + the largest R_k of every group, [G]."""
        return self.prompts + np.maximum.reduceat(self.candidates, self.starts[:-1])

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """The numbers at which the candidates of every group begin in `candidates`, and the last end, [G + 1]."""
        return np.concatenate([[0], np.cumsum(self.counts)])


def data_digest(groups: Iterable[Group]) -> str:
    """Compute the SHA-256 of ids, token ids and rewards of the groups, in order.

    Importance weights and log-probs of single tokens are included where groups have them.
    """
    return digest_texts(
        digest_text(
            group.id,
            repr(group.prompt),
            repr(group.candidates),
            group.rewards,
            [(name, vars(group)[name]) for name in FURTHER_DIGESTED if vars(group)[name] is not None],
        )
        for group in groups
    )


def digest_text(
    id: str,
    prompt: str,
    candidates: str,
    rewards: tuple[float, ...] | None,
    further: Iterable[tuple[str, tuple[object, ...]]],
) -> str:
    """Write a group for the `data_digest`: it is the text of a tuple.

    Args:
        id: of the group.
        prompt: the text of the tuple of its ids.
        candidates: that of the tuple of the candidates' tuples.
        rewards: K rewards, or None.
        further: those fields of FURTHER_DIGESTED that the group has, in this order.
    """
    return f"({', '.join([repr(id), prompt, candidates, repr(rewards), *map(repr, further)])})"


def digest_texts(texts: Iterable[str]) -> str:
    """Compute the SHA-256 of texts, one after another."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()


class StepSampler:
    """Shuffled epochs that are cut into steps of `groups_per_step` groups.

    The last step of an epoch may be smaller. Each epoch is a permutation of all groups keyed by
    (seed, epoch). There is no state between calls.

    Args:
        num_groups: size of the data set.
        groups_per_step: groups of one optimizer step, over all data-parallel ranks.
        epochs: passes over the data.
        max_steps: most steps, if the epochs last longer; None for no limit.
        seed: seed of the order.
    """

    def __init__(self, num_groups: int, *, groups_per_step: int, epochs: int, max_steps: int | None, seed: int) -> None:
        if min(num_groups, groups_per_step, epochs) < 1:
            raise ValueError(f"sizes must be positive: {num_groups=}, {groups_per_step=}, {epochs=}")
        self.num_groups = num_groups
        self.groups_per_step = groups_per_step
        self.seed = seed
        self.steps_per_epoch = -(-num_groups // groups_per_step)
        steps = epochs * self.steps_per_epoch
        self.total_steps = steps if max_steps is None else min(steps, max_steps)

    def indices(self, step: int) -> list[int]:
        """List the indices (0..num_groups-1) of the groups of one step, 0 <= step < total_steps.

        Raises IndexError for another step.
        """
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of {self.total_steps}")
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.num_groups, self.seed, epoch)
        return list(order[place * self.groups_per_step : (place + 1) * self.groups_per_step])

    def epoch(self, steps: int) -> float:
        """Count the passes over the data after `steps` steps (0..total_steps), fractions included.

        Raises IndexError for another number of steps.
        """
        if not 0 <= steps <= self.total_steps:
            raise IndexError(f"{steps} of {self.total_steps} steps")
        epochs, place = divmod(steps, self.steps_per_epoch)
        return epochs + place * self.groups_per_step / self.num_groups


@lru_cache(maxsize=4)
def _epoch_order(num_groups: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Permute range(num_groups).

    The order is that of raw Philox words. numpy guarantees this stream for all versions, unlike
    that of `Generator.permutation`, and a run must see the same order if it resumes with another
    numpy.
    """
    key = np.array([seed & (2**64 - 1), epoch], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(num_groups)
    return tuple(np.argsort(words, kind="stable").tolist())
