"""The groups of one step as the work of this rank: rows of whole groups, and shares of oversized ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exo_megatron.data.groups import Group
from exo_megatron.data.oversized import plan_oversized
from exo_megatron.data.packing import make_microbatch, plan_microbatches
from exo_megatron.training.objectives import RowBatch
from exo_megatron.training.optimizer import Trainee
from exo_megatron.training.oversized import OversizedGroups


@dataclass(frozen=True)
class StepBatches:
    """rows: this data-parallel rank's micro-batches, at least one. oversized: work on groups that fit into none."""

    rows: list[RowBatch]
    oversized: OversizedGroups


def step_batches(trainee: Trainee, groups: Sequence[Group]) -> StepBatches:
    """Plan one step; every rank passes all groups. Raises DataError for a group that fits in no way."""
    topology = trainee.topology
    data_size, multiple, hidden_size = topology.data_size, topology.row_multiple, trainee.spec.hidden_size
    max_tokens = trainee.compute.max_tokens_per_microbatch
    large = plan_oversized(
        groups,
        data_size=data_size,
        max_tokens=max_tokens,
        multiple=multiple,
        hidden_size=hidden_size,
        equal_passes=topology.shares_experts,
    )
    ordinary = [groups[i] for i in large.ordinary]
    plan = plan_microbatches(
        ordinary,
        data_size=data_size,
        max_tokens=max_tokens,
        multiple=multiple,
        hidden_size=hidden_size,
        loads=large.loads,
    )
    rows = [
        RowBatch.of(make_microbatch([ordinary[i] for i in row], multiple=multiple), topology.device)
        for row in plan[topology.data_rank]
    ]
    return StepBatches(rows, OversizedGroups(groups, large.waves))
