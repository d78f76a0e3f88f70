"""Mean and spread of rewards, from sums that are made share by share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from statistics import fmean


@dataclass(frozen=True)
class RewardSums:
    """Sums over the rewards of some groups.

    Attributes:
        prompts: number of groups.
        candidates: number of rewards.
        mean: of all rewards.
        squares: sum of the squared deviations from `mean`.
        equal: number of groups whose rewards are all equal.
    """

    prompts: int = 0
    candidates: int = 0
    mean: float = 0.0
    squares: float = 0.0
    equal: int = 0

    @classmethod
    def of(cls, groups: Sequence[Sequence[float]]) -> RewardSums:
        """Sum up the rewards of groups, each of which has at least one. There may be no group."""
        rewards = list(chain.from_iterable(groups))
        if not rewards:
            return cls()
        mean = fmean(rewards)
        squares = math.fsum((reward - mean) ** 2 for reward in rewards)
        return cls(len(groups), len(rewards), mean, squares, sum(len(set(group)) == 1 for group in groups))

    def joined(self, other: RewardSums) -> RewardSums:
        """Return the sums over the groups of both.

        The deviations of both are taken from the common mean (Chan et al.), without the difference of
        two large sums of squares.
        """
        candidates = self.candidates + other.candidates
        share = other.candidates / max(candidates, 1)
        apart = other.mean - self.mean
        return RewardSums(
            self.prompts + other.prompts,
            candidates,
            self.mean + apart * share,
            self.squares + other.squares + apart * apart * self.candidates * share,
            self.equal + other.equal,
        )

    def summary(self) -> dict[str, float]:
        """Return mean and standard deviation, and the share of groups of equal rewards.

        Such groups have nothing to learn from.
        """
        return {
            "prompts": self.prompts,
            "candidates": self.candidates,
            "reward_mean": self.mean,
            "reward_std": math.sqrt(self.squares / self.candidates),
            "equal_share": self.equal / self.prompts,
        }


def join_sums(sums: Iterable[RewardSums]) -> RewardSums:
    """Return the sums over all groups. The order of the terms decides the last bits."""
    return reduce(RewardSums.joined, sums, RewardSums())
