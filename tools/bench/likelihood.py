"""An objective that separate rows compute exactly as groups do: the candidates' log-probs, each times a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from exo_megatron.data.groups import Group
from exo_megatron.logprobs.sequence import sequence_logprobs
from exo_megatron.training.objectives import RowBatch, UnitSum


class WeightedLikelihood:
    """sum_k r_k log pi(y_k|x), the rewards r_k taken as weights. See MicroBatchObjective; the unit is the candidate."""

    temperature = 1.0
    statistic_names: tuple[str, ...] = ()

    def __call__(self, token_logps: Tensor, batch: RowBatch) -> UnitSum:
        """See MicroBatchObjective."""
        logps = sequence_logprobs(token_logps, batch.layout)
        weights = logps if batch.rewards is None else batch.rewards
        return UnitSum((logps * weights).sum(), logps.shape[0], {})


def unshared(groups: Sequence[Group]) -> list[Group]:
    """Every candidate as a group of its own, with its own copy of the prompt."""
    return [
        replace(group, id=f"{group.id}-{k}", candidates=(candidate,), rewards=(group.rewards or ())[k : k + 1])
        for group in groups
        for k, candidate in enumerate(group.candidates)
    ]
