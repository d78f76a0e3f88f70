"""One optimizer step: micro-batches, the 1F1B schedule forward and backward, reduction, Adam."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from exo_megatron.data.groups import Group
from exo_megatron.data.oversized import plan_oversized
from exo_megatron.data.packing import make_microbatch, microbatch_capacity, plan_microbatches
from exo_megatron.execution.forward import stage_output
from exo_megatron.parallel.upload import to_device
from exo_megatron.training.gradients import update_weights
from exo_megatron.training.objectives import DeviceBatch, MicroBatchObjective, UnitSum
from exo_megatron.training.optimizer import Trainee
from exo_megatron.training.oversized import OversizedGroups, oversized_gradients
from exo_megatron.training.schedule import run_schedule


@dataclass(frozen=True)
class StepBatches:
    """The work of one step on this rank.

    Attributes:
        microbatches: those of this data-parallel rank, at least one, on its device.
        oversized: work on groups that exceed a micro-batch; None if there are none.
    """

    microbatches: list[DeviceBatch]
    oversized: OversizedGroups | None


def plan_step(trainee: Trainee, groups: Sequence[Group], objective: MicroBatchObjective) -> StepBatches:
    """Plan one step; every rank passes all groups.

    Raises DataError for a group that cannot be fitted.
    """
    topology, max_tokens = trainee.policy.topology, trainee.policy.compute.max_tokens_per_microbatch
    multiple, hidden_size = topology.token_multiple, trainee.policy.spec.hidden_size
    ordinary: Sequence[Group] = groups
    loads: Sequence[float] | None = None
    oversized: OversizedGroups | None = None
    if any(group.num_tokens > microbatch_capacity(max_tokens, multiple) for group in groups):
        large = plan_oversized(
            groups,
            data_size=topology.data_size,
            max_tokens=max_tokens,
            multiple=multiple,
            hidden_size=hidden_size,
            equal_passes=topology.shares_experts,
        )
        ordinary, loads = [groups[i] for i in large.ordinary], large.loads
        oversized = OversizedGroups(groups, large.rounds)
    plan = plan_microbatches(
        ordinary,
        data_size=topology.data_size,
        max_tokens=max_tokens,
        multiple=multiple,
        hidden_size=hidden_size,
        loads=loads,
    )
    microbatches = [
        DeviceBatch.of(
            make_microbatch([ordinary[i] for i in indices], multiple=multiple), with_best=objective.needs_best
        )
        for indices in plan[topology.data_rank]
    ]
    return StepBatches(to_device(microbatches, topology.device), oversized)


@dataclass(frozen=True)
class StepResult:
    """The result of one step, equal on every rank.

    loss and statistics are means over the global units; stop_requested is true if any rank was
    asked to stop, writing if any still writes its part of a checkpoint.
    """

    loss: float
    grad_norm: float
    units: int
    statistics: dict[str, float]
    stop_requested: bool
    writing: bool


def train_step(
    trainee: Trainee,
    batches: Sequence[DeviceBatch],
    objective: MicroBatchObjective,
    *,
    learning_rate: float,
    oversized: OversizedGroups | None = None,
    stop_requested: bool = False,
    writing: bool = False,
) -> StepResult:
    """Train on one global batch.

    Collectives: the schedule's point-to-point transfers over the pipeline group, one all-gather of
    log-probs per micro-batch over the tensor group, reduce-scatter of gradients and all-gather of
    weights over the data group, one all-reduce of the gradient norm and one of the statistics over
    the world.

    Args:
        trainee: the policy under training.
        batches: this data-parallel rank's micro-batches, at least one.
        objective: the loss of a micro-batch.
        learning_rate: of this step.
        oversized: the work on groups that exceed a micro-batch.
        stop_requested: whether this rank has been asked to stop.
        writing: whether this rank still writes its part of a checkpoint.

    Returns:
        Means over the global units, equal on every rank.
    """
    reports = forward_gradients(trainee, batches, objective, oversized)
    trainee.set_learning_rate(learning_rate)
    grad_norm = update_weights(trainee.optimizer, trainee.clip_grad)
    return _reduce(trainee, reports, objective, grad_norm, (stop_requested, writing))


def forward_gradients(
    trainee: Trainee,
    batches: Sequence[DeviceBatch],
    objective: MicroBatchObjective,
    oversized: OversizedGroups | None = None,
) -> list[UnitSum]:
    """Compute the reduced gradient of the global mean loss into the model's gradient buffers.

    Returns the detached sums of each micro-batch, and of each oversized group that this rank
    counts, on the last pipeline stage; an empty list on the others.
    """
    trainee.model.zero_grad_buffer()
    trainee.optimizer.zero_grad()
    # First, because the reduction may begin inside the last micro-batch.
    reports = oversized_gradients(trainee, oversized, objective) if oversized is not None else []
    counted = sum(report.count for report in reports)
    run_schedule(
        trainee,
        partial(_forward_step, trainee=trainee, objective=objective, reports=reports),
        # The units counted already go to the schedule, which divides by all units, with the first
        # micro-batch.
        list(zip(batches, chain((counted,), repeat(0)), strict=False)),
        [batch.layout.num_tokens for batch in batches],
    )
    return reports


def _forward_step(
    data_iterator: Iterator[tuple[DeviceBatch, int]],
    model: torch.nn.Module,
    *,
    trainee: Trainee,
    objective: MicroBatchObjective,
    reports: list[UnitSum],
) -> tuple[Tensor, Any]:
    """Run a step of megatron-core's schedule.

    Returns hidden states, or the loss on the last pipeline stage.
    """
    batch, counted = next(data_iterator)
    output = stage_output(model, batch.layout)
    if not trainee.policy.topology.is_last_stage:
        return output, None
    result = objective(output, batch, trainee.policy)
    reports.append(UnitSum(result.total.detach(), result.count, result.statistics))
    return result.total, partial(_loss, count=result.count + counted)


def _loss(total: Tensor, *, count: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the results of megatron-core's loss_func for an exact mean: sum, count, report.

    count: units of the micro-batch, and those whose gradients are in the buffers already.
    """
    return total.float(), torch.full((), count, dtype=torch.int, device=total.device), {}


def _reduce(
    trainee: Trainee,
    reports: Sequence[UnitSum],
    objective: MicroBatchObjective,
    grad_norm: Tensor,
    flags: tuple[bool, bool],
) -> StepResult:
    """Sum the reports of all data-parallel ranks by one all-reduce over the world.

    Each report counts once, from tensor rank 0 of the last pipeline stage. Here the host waits for
    the device, once in a step. grad_norm: [] fp64, equal on every rank. flags: stop_requested and
    writing of this rank.
    """
    names = objective.statistic_names
    device = trainee.policy.topology.device
    sums = torch.zeros(len(names) + 2 + len(flags), dtype=torch.float64, device=device)
    if trainee.policy.topology.is_last_stage and trainee.policy.topology.tensor_rank == 0:
        for report in reports:
            values = [report.total, *(report.statistics[name] for name in names)]
            sums[1 : -len(flags)] += torch.stack([value.double() for value in values])
            sums[0] += report.count
    for place, flag in enumerate(flags):
        sums[place - len(flags)].fill_(flag)
    dist.all_reduce(sums)
    norm, count, total, *rest, stops, writers = torch.cat((grad_norm[None], sums)).tolist()
    units = max(int(count), 1)
    means = {name: value / units for name, value in zip(names, rest, strict=True)}
    return StepResult(total / units, norm, int(count), means, stops > 0, writers > 0)
