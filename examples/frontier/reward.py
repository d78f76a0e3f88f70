"""The reward with two modes as a reward function of `exo-megatron score`."""

from __future__ import annotations

from collections.abc import Sequence

from quickstart import oracle

from frontier.reviews import REWARD_SCALE


def score(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """REWARD_SCALE * |log-odds| of each whole text, prompt and completion."""
    return [REWARD_SCALE * abs(log_odds) for log_odds in oracle.score(prompts, completions)]
