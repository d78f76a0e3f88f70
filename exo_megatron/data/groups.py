"""The candidate group: one prompt, its K candidates, their rewards and reference log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """One prompt and its K >= 1 candidates, as token ids fixed at ingestion.

    prompt: P >= 1 token ids. candidates: K tuples of R_k >= 1 ids, end-of-sequence included where the candidate
    ended by itself. For preference data candidate 0 is the chosen one. rewards and reference_logprobs, where
    known, hold K floats; a reference log-prob is the sum over the candidate's tokens, in nats, at the
    temperature of the loss.
    """

    id: str
    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    rewards: tuple[float, ...] | None = None
    reference_logprobs: tuple[float, ...] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that the group occupies in a packed row: P + R_1 + ... + R_K."""
        return len(self.prompt) + sum(len(candidate) for candidate in self.candidates)

    def take(self, numbers: Sequence[int]) -> Group:
        """The group of the candidates with these numbers only, in this order, with all that is known of them."""
        return Group(
            self.id,
            self.prompt,
            tuple(self.candidates[k] for k in numbers),
            rewards=_taken(self.rewards, numbers),
            reference_logprobs=_taken(self.reference_logprobs, numbers),
        )


def _taken(values: tuple[float, ...] | None, numbers: Sequence[int]) -> tuple[float, ...] | None:
    return None if values is None else tuple(values[k] for k in numbers)
