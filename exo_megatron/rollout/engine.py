"""The interface of a rollout engine, which draws K candidates per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from exo_megatron.config.sections import SamplingConfig
from exo_megatron.data.prompts import Prompt
from exo_megatron.utils.progress import Progress


@dataclass(frozen=True)
class GeneratedCandidate:
    """One candidate.

    Attributes:
        token_ids: at least one, the end-of-sequence token included if `finished`.
        finished: whether it ended by itself.
        logprob: sum over token_ids in nats under softmax(logits / temperature), without top-p.
    """

    token_ids: tuple[int, ...]
    finished: bool
    logprob: float


@dataclass(frozen=True)
class GeneratedGroup:
    """The K candidates of one prompt, by number."""

    prompt_id: str
    candidates: tuple[GeneratedCandidate, ...]


class RolloutEngine(Protocol):
    """An engine that draws candidates from one policy."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, seed: int, progress: Progress | None
    ) -> list[GeneratedGroup]:
        """Draw one group per prompt, in order.

        Collective over one model-parallel group, whose ranks pass the same arguments and get the
        same result; each data-parallel rank passes its own prompts. A candidate depends only on the
        policy, seed, prompt id and ids, its number and the sampling settings.

        Args:
            prompts: of this data-parallel rank.
            sampling: K, temperature, top_p and length.
            seed: of the draws.
            progress: counts completed candidates.
        """
        ...
