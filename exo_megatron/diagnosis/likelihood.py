"""An objective that separate sequences compute exactly as groups do: the sum of weighted log-probs of
candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from exo_megatron.data.groups import Group
from exo_megatron.execution.policy import Policy
from exo_megatron.logprobs.vocab_parallel import sequence_logprobs
from exo_megatron.training.objectives import DeviceBatch, UnitSum


class WeightedLikelihood:
    """The objective sum_k r_k log pi(y_k|x), with the rewards r_k as weights.

    The unit is the candidate. See MicroBatchObjective.
    """

    statistic_names: tuple[str, ...] = ()
    needs_best = False

    def __call__(self, hidden: Tensor, batch: DeviceBatch, policy: Policy) -> UnitSum:
        """See MicroBatchObjective."""
        logps = sequence_logprobs(policy.token_logprobs(hidden, batch.layout, temperature=1.0), batch.layout)
        weights = logps if batch.rewards is None else batch.rewards
        return UnitSum((logps * weights).sum(), logps.shape[0], {})


def unshared(groups: Sequence[Group]) -> list[Group]:
    """Return every candidate as a group of its own, with its own copy of the prompt."""
    return [
        replace(group, id=f"{group.id}-{k}", candidates=(candidate,), rewards=(group.rewards or ())[k : k + 1])
        for group in groups
        for k, candidate in enumerate(group.candidates)
    ]
