"""One optimizer step: forward and backward over the micro-batches of the 1F1B schedule, reduction, Adam."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from exo_megatron.training.forward import row_logprobs, stage_output
from exo_megatron.training.objectives import MicroBatchObjective, RowBatch, UnitSum
from exo_megatron.training.optimizer import Trainee
from exo_megatron.training.oversized import OversizedGroups, oversized_gradients


@dataclass(frozen=True)
class StepResult:
    """What one step did, equal on every rank: means over the global units, and whether some rank asked to stop."""

    loss: float
    grad_norm: float
    units: int
    statistics: dict[str, float]
    stop_requested: bool


def train_step(
    trainee: Trainee,
    batches: Sequence[RowBatch],
    objective: MicroBatchObjective,
    *,
    learning_rate: float,
    oversized: OversizedGroups | None = None,
    stop_requested: bool = False,
) -> StepResult:
    """Train on one global batch.

    batches: this data-parallel rank's micro-batches, at least one. oversized: the work on groups that fit into none.

    Collectives: the schedule's point-to-point transfers over the pipeline group, one all-gather of log-probs per
    micro-batch over the tensor group, reduce-scatter of gradients and all-gather of weights over the data group,
    one all-reduce of the statistics over the world.
    """
    reports = forward_gradients(trainee, batches, objective, oversized)
    trainee.set_learning_rate(learning_rate)
    _, grad_norm, _ = trainee.optimizer.step()
    return _reduce(trainee, reports, objective, float(grad_norm or 0.0), stop_requested)


def forward_gradients(
    trainee: Trainee,
    batches: Sequence[RowBatch],
    objective: MicroBatchObjective,
    oversized: OversizedGroups | None = None,
) -> list[UnitSum]:
    """Leave the gradient of the global mean loss in the model's gradient buffers, reduced over all groups.

    Returns the detached sums of each micro-batch, and of each oversized group that this rank counts, on the last
    pipeline stage, nothing on the others.
    """
    trainee.model.zero_grad_buffer()
    trainee.optimizer.zero_grad()
    # First, because the reduction may begin inside the last micro-batch.
    reports = oversized_gradients(trainee, oversized, objective) if oversized is not None else []
    counted = sum(report.count for report in reports)
    run_schedule = get_forward_backward_func()
    run_schedule(
        forward_step_func=partial(_forward_step, trainee=trainee, objective=objective, reports=reports),
        # The units counted already go to the schedule, which divides by all units, with the first micro-batch.
        data_iterator=iter(zip(batches, chain((counted,), repeat(0)), strict=False)),
        model=[trainee.model],
        num_microbatches=len(batches),
        seq_length=1,  # not read: rows differ in length (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=False,
    )
    return reports


def _forward_step(
    data_iterator: Iterator[tuple[RowBatch, int]],
    model: torch.nn.Module,
    *,
    trainee: Trainee,
    objective: MicroBatchObjective,
    reports: list[UnitSum],
) -> tuple[Tensor, Any]:
    """megatron-core's forward_step_func: hidden states, or the last stage's token log-probs and their loss."""
    batch, counted = next(data_iterator)
    output = stage_output(model, batch.layout)
    if not trainee.topology.is_last_stage:
        return output, None
    token_logps = row_logprobs(trainee, output, batch.layout, objective.temperature)
    return token_logps, partial(_loss, batch=batch, counted=counted, objective=objective, reports=reports)


def _loss(
    token_logps: Tensor, *, batch: RowBatch, counted: int, objective: MicroBatchObjective, reports: list[UnitSum]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """megatron-core's loss_func with three results, which give an exact global mean: sum, integer count, report.

    counted: units whose gradients are in the buffers already.
    """
    result = objective(token_logps, batch)
    reports.append(UnitSum(result.total.detach(), result.count, result.statistics))
    count = torch.full((), result.count + counted, dtype=torch.int, device=token_logps.device)
    return result.total.float(), count, {}


def _reduce(
    trainee: Trainee,
    reports: Sequence[UnitSum],
    objective: MicroBatchObjective,
    grad_norm: float,
    stop_requested: bool,
) -> StepResult:
    """Sum the reports of all data-parallel ranks; each counts once, from tensor rank 0 of its last stage."""
    names = objective.statistic_names
    device = trainee.topology.device
    sums = torch.zeros(len(names) + 3, dtype=torch.float64, device=device)
    if trainee.topology.is_last_stage and trainee.topology.tensor_rank == 0:
        for report in reports:
            values = [report.total, *(report.statistics[name] for name in names)]
            sums[1:-1] += torch.stack([value.double() for value in values])
            sums[0] += report.count
    sums[-1] = float(stop_requested)
    dist.all_reduce(sums)
    count, total, *rest, stops = sums.tolist()
    units = max(int(count), 1)
    means = {name: value / units for name, value in zip(names, rest, strict=True)}
    return StepResult(total / units, grad_norm, int(count), means, stops > 0)
