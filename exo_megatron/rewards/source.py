"""The interface of a reward source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class RewardSource(Protocol):
    """A source of rewards for candidates of prompts."""

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Return one reward per candidate; `completions[i]` is a candidate of `prompts[i]`.

        A prompt may occur several times. The whole text is prompt + candidate, with any space
        between them included. The caller checks that the rewards are finite, because it knows the
        names of the records. Raises RewardError if the source cannot give rewards.
        """
        ...
