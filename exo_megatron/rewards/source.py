"""What a reward source is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class RewardSource(Protocol):
    """Judges completions of prompts."""

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """One reward per completion; prompts[i] belongs to completions[i] and may occur several times.

        A completion continues its prompt: the whole text is prompt + completion, with whatever space parts them.
        Whether the numbers are finite is checked by the caller, who knows the names of the records.
        Raises RewardError when the source cannot do its work.
        """
        ...
