"""What a rollout engine is: prompts in, K sampled candidates per prompt out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from exo_megatron.config.sections import SamplingConfig
from exo_megatron.data.dataset import Prompt
from exo_megatron.utils.progress import Progress


@dataclass(frozen=True)
class GeneratedCandidate:
    """One candidate. token_ids: at least one, the end-of-sequence token included where it ended by itself
    (`finished`). logprob: sum over token_ids in nats under softmax(logits / temperature), without top-p.
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
    """Draws candidates from one policy."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, seed: int, progress: Progress | None
    ) -> list[GeneratedGroup]:
        """One group per prompt, in order.

        Collective over one model-parallel group, whose ranks pass the same arguments and get the same result;
        each data-parallel rank passes its own prompts. A candidate depends on the policy, seed, prompt id and ids,
        its number and the sampling settings only. progress: counts completed candidates.
        """
        ...
