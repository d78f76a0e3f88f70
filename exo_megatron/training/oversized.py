"""Gradients of groups that do not fit into a row: value and gradient of the whole group, from its parts.

The gradient of a group's loss is sum_k c_k d log pi(y_k | x), where c_k is the loss's derivative by the log-prob of
candidate k. So: the prompt once, with its graph (exo_megatron/models/shared_prompt.py); the candidates of all parts
but the first without gradients, for their log-probs, in few large rows; then every part with gradients, as the
likelihood weighted with c_k, which is known once the first part's log-probs are; at last the prompt's backward. Parts
go through megatron-core's schedule, so that the stages of a pipeline work on several. Forward and backward cost
3 P + 3 sum R, as in one row, and the parts but the first a forward more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from exo_megatron.data.groups import Group
from exo_megatron.data.oversized import Wave
from exo_megatron.logprobs.sequence import sequence_logprobs
from exo_megatron.models.shared_prompt import PartLayout, PromptLayout, build_part_layout, build_prompt_layout
from exo_megatron.parallel.topology import Topology
from exo_megatron.rollout.pipeline import forward_only
from exo_megatron.training.forward import row_logprobs, stage_output
from exo_megatron.training.objectives import AlignObjective, MicroBatchObjective, UnitSum, vector
from exo_megatron.training.optimizer import Trainee
from exo_megatron.training.prompt_pass import backward_prompt, forward_prompt

LossOfPart = Callable[["Part", Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""megatron-core's loss_func, given a part and its token log-probs [N]."""


@dataclass(frozen=True)
class OversizedGroups:
    """The groups of a step, and the waves in which the oversized ones among them are done. See data/oversized.py."""

    groups: Sequence[Group]
    waves: Sequence[Wave]

    @property
    def count(self) -> int:
        """Number of oversized groups."""
        return len({share.group for wave in self.waves for share in wave.shares} - {None})


@dataclass(frozen=True)
class Part:
    """Some candidates of a group: their pass, and their places among all candidates of the wave ([C] int64)."""

    layout: PartLayout
    places: Tensor


@dataclass(frozen=True)
class LocalShare:
    """This rank's share of a wave, on its device.

    parts, scored: passes with and without gradients, see data/oversized.py. own: where its group's K candidates are
    among the `candidates` of all groups of the wave. rewards, reference_logps: [K] fp64 of the group; None where there
    is no group, and rewards where the loss needs none. counts: whether this rank reports the group's loss, which other
    ranks may share. spread: whether any group of the wave is shared.
    """

    prompt: PromptLayout
    parts: tuple[Part, ...]
    scored: tuple[Part, ...]
    candidates: int
    own: slice
    rewards: Tensor | None
    reference_logps: Tensor | None
    counts: bool
    spread: bool

    @classmethod
    def of(cls, groups: Sequence[Group], wave: Wave, topology: Topology) -> LocalShare:
        """Lay out what this data-parallel rank has to do."""
        share = wave.shares[topology.data_rank]
        numbers = sorted({each.group for each in wave.shares if each.group is not None})
        starts = [0, *accumulate(len(groups[number].candidates) for number in numbers)]
        multiple, device = topology.row_multiple, topology.device
        group = None if share.group is None else groups[share.group]
        start = 0 if share.group is None else starts[numbers.index(share.group)]
        prompt = build_prompt_layout(group.prompt if group else (), multiple=multiple, device=device)

        def laid_out(numbers: Sequence[int]) -> Part:
            candidates = [group.candidates[number] for number in numbers] if group else []
            layout = build_part_layout(prompt.shared, candidates, multiple=multiple, device=device)
            places = torch.tensor([start + number for number in numbers], dtype=torch.int64)
            return Part(layout, places.to(device, non_blocking=True))

        first = [each.group for each in wave.shares].index(share.group)
        return cls(
            prompt=prompt,
            parts=tuple(laid_out(numbers) for numbers in share.parts),
            scored=tuple(laid_out(numbers) for numbers in share.scored),
            candidates=starts[-1],
            own=slice(start, start + (len(group.candidates) if group else 0)),
            rewards=vector(group.rewards or (), device) if group else None,
            reference_logps=vector(group.reference_logprobs or (), device) if group else None,
            counts=group is not None and first == topology.data_rank,
            spread=wave.spread,
        )


def oversized_gradients(trainee: Trainee, work: OversizedGroups, objective: MicroBatchObjective) -> list[UnitSum]:
    """Add the gradients of this rank's shares to the model's gradient buffers, as sums, not reduced.

    Returns the detached sums of the groups that this rank counts, on the last pipeline stage. Collectives: those of
    the passes, and for a wave that spreads a group one all-reduce of its log-probs over the data group.
    """
    reports: list[UnitSum] = []
    if not work.waves:
        return reports
    if not isinstance(objective, AlignObjective):
        raise TypeError("only alignment has groups of several candidates")
    with _unreduced(trainee):
        for wave in work.waves:
            share = LocalShare.of(work.groups, wave, trainee.topology)
            coefficients = Coefficients(share, objective, trainee.topology)
            _run(trainee, share, coefficients)
            reports += coefficients.reports
    return reports


@contextmanager
def _unreduced(trainee: Trainee) -> Iterator[None]:
    """megatron-core's schedule without what it does at the end of a step: reduction and division of gradients."""
    config = trainee.policy.config
    finalize, no_sync = config.finalize_model_grads_func, config.no_sync_func
    config.finalize_model_grads_func = config.no_sync_func = None
    try:
        with trainee.model.no_sync():
            yield
    finally:
        config.finalize_model_grads_func, config.no_sync_func = finalize, no_sync


class Coefficients:
    """The log-probs of a wave's candidates as passes find them, and then the coefficients of this rank's group.

    Of the last pipeline stage. reports: what the step counts of the wave on this rank.
    """

    def __init__(self, share: LocalShare, objective: AlignObjective, topology: Topology) -> None:
        self.share = share
        self.objective = objective
        self.topology = topology
        self.logps = torch.zeros(share.candidates, dtype=torch.float64, device=topology.device)
        self.values = torch.zeros_like(self.logps)
        self.reports: list[UnitSum] = []

    def record(self, part: Part, logps: Tensor) -> None:
        """Take note of a part's log-probs, [C] fp64."""
        self.logps[part.places] = logps.detach()

    def settle(self) -> None:
        """When this rank's log-probs are complete: get those of the other ranks, and differentiate the loss.

        One all-reduce of the wave's log-probs over the data group where the wave spreads a group.
        """
        share = self.share
        if share.spread:
            dist.all_reduce(self.logps, group=self.topology.data_group)
        if share.reference_logps is None:
            return
        with torch.enable_grad():
            own = self.logps[share.own].clone().requires_grad_()
            result = self.objective.of_candidates(own, share.reference_logps, share.rewards, (own.shape[0],))
            (self.values[share.own],) = torch.autograd.grad(result.total, own)
        if share.counts:
            self.reports.append(UnitSum(result.total.detach(), result.count, result.statistics))


def _run(trainee: Trainee, share: LocalShare, coefficients: Coefficients) -> None:
    """This rank's passes of one wave."""
    temperature = coefficients.objective.temperature

    def note(part: Part, token_logps: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        coefficients.record(part, sequence_logprobs(token_logps, part.layout.row))
        return _loss(token_logps.sum())

    def weigh(part: Part, token_logps: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logps = sequence_logprobs(token_logps, part.layout.row)
        if part is share.parts[0]:
            coefficients.record(part, logps)
            coefficients.settle()
        return _loss((coefficients.values[part.places] * logps).sum())

    if not share.parts:
        if trainee.topology.is_last_stage:
            coefficients.settle()
        return
    prompt = forward_prompt(trainee, share.prompt)
    if share.scored:
        with forward_only(trainee.policy):
            _schedule(trainee, share.scored, note, temperature=temperature, backward=False)
    _schedule(trainee, share.parts, weigh, temperature=temperature, backward=True)
    backward_prompt(trainee, prompt)


def _loss(total: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What megatron-core's loss_func returns: the sum, a count of none (the step counts whole groups), no report."""
    return total.float(), torch.zeros((), dtype=torch.int, device=total.device), {}


def _schedule(trainee: Trainee, parts: Sequence[Part], loss: LossOfPart, *, temperature: float, backward: bool) -> None:
    get_forward_backward_func()(
        forward_step_func=partial(_forward_part, trainee=trainee, loss=loss, temperature=temperature),
        data_iterator=iter(parts),
        model=[trainee.model],
        num_microbatches=len(parts),
        seq_length=1,  # not read: rows differ in length (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=not backward,
    )


def _forward_part(
    data_iterator: Iterator[Part], model: torch.nn.Module, *, trainee: Trainee, loss: LossOfPart, temperature: float
) -> tuple[Tensor, Any]:
    """megatron-core's forward_step_func: hidden states, or the last stage's token log-probs and their loss."""
    part = next(data_iterator)
    output = stage_output(model, part.layout)
    if not trainee.topology.is_last_stage:
        return output, None
    return row_logprobs(trainee, output, part.layout.row, temperature), partial(loss, part)
