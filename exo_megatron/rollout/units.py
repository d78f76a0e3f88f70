"""Units of a rollout: whole shards that are drawn, scored and written before the next ones begin."""

from __future__ import annotations

from exo_megatron.config.sections import SamplingConfig
from exo_megatron.data.shards import count_shards

FILLS = 16
"""Times that the prompts of a unit fill all candidate slots: at its end, slots run empty once."""


def plan_units(shards: int, sampling: SamplingConfig, model_copies: int) -> list[range]:
    """Divide the numbers of shards into units, the last of which may be smaller.

    A unit is what a rank has in memory, and what an interrupted rollout does again: how its candidates
    are packed decides the last bits of their log-probs.
    """
    prompts = FILLS * model_copies * sampling.max_active_candidates // sampling.candidates
    size = max(1, count_shards(prompts))
    return [range(first, min(first + size, shards)) for first in range(0, shards, size)]
