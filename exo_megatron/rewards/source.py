"""The interface of a reward source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from exo_megatron.data.text import Chat


@dataclass(frozen=True)
class SampledIds:
    """The token ids that the policy read and drew.

    Attributes:
        prompt: P >= 1 ids.
        candidate: R >= 1 ids as sampled.
        finished: whether the candidate ended by itself.
    """

    prompt: tuple[int, ...]
    candidate: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class Completion:
    """A candidate as a reward source judges it.

    Attributes:
        where: record and candidate, for messages.
        prompt: the text of the prompt as the policy saw it. Messages that no policy has rendered
            yet are plain text.
        text: the text of the candidate; prompt + text is the whole text, any space between them
            included.
        chat: the conversation, with the assistant's answer after the messages of the prompt; None if
            the data has strings.
        columns: the record's columns that are none of our fields. All completions of a stage have
            the same names; None stands for a column that this record lacks.
        sampled: the ids of a candidate that a policy of ours drew.
    """

    where: str
    prompt: str
    text: str
    chat: Chat | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    sampled: SampledIds | None = None


class RewardSource(Protocol):
    """A source of rewards for candidates of prompts."""

    def score(self, completions: Sequence[Completion]) -> list[float]:
        """Return one reward per candidate, in order.

        A prompt may occur several times. The caller checks that the rewards are finite. Raises
        RewardError if the source cannot give rewards.
        """
        ...
