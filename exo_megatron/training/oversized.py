"""Value and gradient of groups that exceed a micro-batch, computed from their parts.

The gradient of a group's loss is sum_k c_k d log pi(y_k | x), where c_k is the derivative of the
loss by the log-prob of candidate k. The passes are, in this order:

1. the prompt once, with its graph (exo_megatron/models/layouts/parts.py);
2. the candidates of all parts but the first without gradients, for their log-probs, in few large
   passes;
3. every part with gradients, as the likelihood weighted with c_k, which is known once the log-probs
   of the first part are;
4. the backward of the prompt.

Parts go through megatron-core's schedule, so that the pipeline stages work on several at the same
time. Forward and backward cost 3 P + 3 sum R, as in one micro-batch, and one forward more for all
parts but the first.
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
from torch import Tensor

from exo_megatron.data.groups import Group
from exo_megatron.data.oversized import Round
from exo_megatron.execution.forward import (
    forward_only,
    receive_from_stage,
    received_hidden,
    send_to_stage,
    stage_output,
)
from exo_megatron.logprobs.vocab_parallel import sequence_logprobs
from exo_megatron.losses.objective import RaggedGroups
from exo_megatron.models.layouts.parts import PartLayout, PromptLayout, build_part_layout, build_prompt_layout
from exo_megatron.parallel.topology import Topology
from exo_megatron.parallel.upload import to_device
from exo_megatron.training.objectives import (
    AlignObjective,
    BestCandidates,
    MicroBatchObjective,
    UnitSum,
    best_candidate,
    logprobs_and_nll,
    vector,
)
from exo_megatron.training.optimizer import Trainee
from exo_megatron.training.schedule import run_schedule


@dataclass(frozen=True)
class PromptPass:
    """The graph between this pipeline stage's input (None on the first) and its output.

    Both are [S / t, 1, H]; the output of the last pipeline stage is [1, H].
    """

    layout: PromptLayout
    received: Tensor | None
    output: Tensor


def forward_prompt(trainee: Trainee, layout: PromptLayout) -> PromptPass:
    """Run the prompt on every pipeline stage, which fills `layout.shared`.

    Point to point over the pipeline group: hidden states in their dtype.
    """
    topology = trainee.policy.topology
    received = None
    if not topology.is_first_stage:
        received = received_hidden(trainee.policy, layout.num_tokens).requires_grad_()
        trainee.policy.model.set_input_tensor(received)
    output = stage_output(trainee.model, layout)
    if not topology.is_last_stage:
        send_to_stage(output.detach(), 1, topology)
    return PromptPass(layout, received, output)


def backward_prompt(trainee: Trainee, prompt: PromptPass) -> None:
    """Add the parts' gradients in `layout.shared` to those of this pipeline stage's weights.

    Point to point over the pipeline group, last pipeline stage first: gradients of the hidden
    states.
    """
    topology = trainee.policy.topology
    if topology.is_last_stage:
        grad = prompt.layout.shared.hidden_gradient()
    else:
        grad = torch.empty_like(prompt.output, memory_format=torch.contiguous_format)
        receive_from_stage(grad, 1, topology)
    torch.autograd.backward(prompt.output, grad)
    if prompt.received is not None and prompt.received.grad is not None:
        send_to_stage(prompt.received.grad, -1, topology)


LossOfPart = Callable[["Part", Tensor, Tensor | None], Tensor]
"""The scalar of a part to differentiate, from token log-probs [N] and its best candidate's term."""


@dataclass(frozen=True)
class OversizedGroups:
    """The groups of a step, and the rounds in which the oversized ones are computed.

    See data/oversized.py.
    """

    groups: Sequence[Group]
    rounds: Sequence[Round]

    @property
    def count(self) -> int:
        """Number of oversized groups."""
        return len({each.group for round_ in self.rounds for each in round_.assignments} - {None})


@dataclass(frozen=True)
class Part:
    """Some candidates of a group.

    Attributes:
        layout: layout of their pass.
        places: [C] int64, their places among all candidates of the round.
        best: for loss.nll_weight, in the one part that has the group's best candidate; else None.
    """

    layout: PartLayout
    places: Tensor
    best: BestCandidates | None


@dataclass(frozen=True)
class LocalWork:
    """The work of this rank in a round, on its device.

    Attributes:
        prompt: layout of the prompt's pass.
        parts, scored: passes with and without gradients, see data/oversized.py.
        candidates: number of candidates of all groups of the round.
        span: place of this rank's group, K candidates, among them.
        grid: places of the group's candidates in a matrix; None where there is no group.
        rewards, reference_logps, log_weights: [K] fp64 of the group; None where there is no group
            or the loss needs none.
        counts: whether this rank reports the loss of the group, in which other ranks may have a
            part.
        divided: whether any group of the round is on several ranks.
    """

    prompt: PromptLayout
    parts: tuple[Part, ...]
    scored: tuple[Part, ...]
    candidates: int
    span: slice
    grid: RaggedGroups | None
    rewards: Tensor | None
    reference_logps: Tensor | None
    log_weights: Tensor | None
    counts: bool
    divided: bool

    @classmethod
    def of(cls, groups: Sequence[Group], round_: Round, topology: Topology, *, with_best: bool) -> LocalWork:
        """Lay out the work of this data-parallel rank in a round."""
        mine = round_.assignments[topology.data_rank]
        numbers = sorted({each.group for each in round_.assignments if each.group is not None})
        starts = [0, *accumulate(len(groups[number].candidates) for number in numbers)]
        multiple = topology.token_multiple
        group = None if mine.group is None else groups[mine.group]
        start = 0 if mine.group is None else starts[numbers.index(mine.group)]
        prompt = build_prompt_layout(group.prompt if group else (), multiple=multiple)

        def lay_out(numbers: Sequence[int]) -> Part:
            candidates = [group.candidates[number] for number in numbers] if group else []
            layout = build_part_layout(prompt.shared, candidates, multiple=multiple)
            places = torch.tensor([start + number for number in numbers], dtype=torch.int64)
            number = best_candidate(group) if group and with_best else None
            if number not in numbers:
                return Part(layout, places, None)
            place = numbers.index(number)
            return Part(layout, places, BestCandidates.of([(place, len(candidates[place]))], layout.packed))

        first = [each.group for each in round_.assignments].index(mine.group)
        work = cls(
            prompt=prompt,
            parts=tuple(lay_out(numbers) for numbers in mine.parts),
            scored=tuple(lay_out(numbers) for numbers in mine.scored),
            candidates=starts[-1],
            span=slice(start, start + (len(group.candidates) if group else 0)),
            grid=RaggedGroups.of((len(group.candidates),), torch.device("cpu")) if group else None,
            rewards=vector(group.rewards or ()) if group else None,
            reference_logps=vector(group.reference_logprobs or ()) if group else None,
            log_weights=vector(group.log_weights or ()) if group else None,
            counts=group is not None and first == topology.data_rank,
            divided=round_.divided,
        )
        return to_device(work, topology.device)


def oversized_gradients(trainee: Trainee, oversized: OversizedGroups, objective: MicroBatchObjective) -> list[UnitSum]:
    """Add the gradients of this rank's work to the model's gradient buffers, as sums, not reduced.

    Returns the detached sums of the groups that this rank counts, on the last pipeline stage.
    Collectives: those of the passes, and for a round that divides a group one all-reduce of its
    log-probs over the data group.
    """
    reports: list[UnitSum] = []
    if not isinstance(objective, AlignObjective):
        raise TypeError("only alignment has groups of several candidates")
    with _unreduced(trainee):
        for round_ in oversized.rounds:
            work = LocalWork.of(oversized.groups, round_, trainee.policy.topology, with_best=objective.needs_best)
            coefficients = Coefficients(work, objective, trainee.policy.topology)
            _run(trainee, work, coefficients)
            reports += coefficients.reports
    return reports


@contextmanager
def _unreduced(trainee: Trainee) -> Iterator[None]:
    """Keep megatron-core's schedule from reducing and dividing gradients at its end."""
    config = trainee.policy.model.config
    finalize, no_sync = config.finalize_model_grads_func, config.no_sync_func
    config.finalize_model_grads_func = config.no_sync_func = None
    try:
        with trainee.model.no_sync():
            yield
    finally:
        config.finalize_model_grads_func, config.no_sync_func = finalize, no_sync


class Coefficients:
    """Log-probs of a round's candidates, and then the coefficients of this rank's group.

    Used on the last pipeline stage. reports: sums that the step counts for the round on this rank.
    """

    def __init__(self, work: LocalWork, objective: AlignObjective, topology: Topology) -> None:
        self.work = work
        self.objective = objective
        self.topology = topology
        self.values = torch.zeros(work.candidates, dtype=torch.float64, device=topology.device)
        self.reports: list[UnitSum] = []
        self._found = torch.zeros((2, work.candidates), dtype=torch.float64, device=topology.device)

    def record(self, part: Part, logps: Tensor, nll: Tensor | None) -> None:
        """Record a part's log-probs [C] fp64, and its best candidate's likelihood term [1]."""
        self._found[0, part.places] = logps.detach()
        if nll is not None:
            self._found[1, part.places[0]] = nll.detach()[0]

    def settle(self) -> None:
        """Fetch the other ranks' log-probs, once this rank's are complete; differentiate the loss.

        One all-reduce of the round's log-probs over the data group if the round divides a group.
        """
        work = self.work
        if work.divided:
            dist.all_reduce(self._found, group=self.topology.data_group)
        if work.reference_logps is None:
            return
        with torch.enable_grad():
            logps = self._found[0, work.span].clone().requires_grad_()
            best_nll = self._found[1, work.span].sum(dim=0, keepdim=True) if self.objective.needs_best else None
            result = self.objective.of_candidates(
                logps,
                work.reference_logps,
                work.rewards,
                (logps.shape[0],),
                places=work.grid,
                log_weights=work.log_weights,
                best_nll=best_nll,
            )
            (self.values[work.span],) = torch.autograd.grad(result.total, logps)
        if work.counts:
            self.reports.append(UnitSum(result.total.detach(), result.count, result.statistics))


def _run(trainee: Trainee, work: LocalWork, coefficients: Coefficients) -> None:
    """Run this rank's passes of one round."""
    nll_weight = coefficients.objective.config.nll_weight

    def note(part: Part, token_logps: Tensor, nll: Tensor | None) -> Tensor:
        coefficients.record(part, sequence_logprobs(token_logps, part.layout.packed), nll)
        return token_logps.sum()

    def weigh(part: Part, token_logps: Tensor, nll: Tensor | None) -> Tensor:
        logps = sequence_logprobs(token_logps, part.layout.packed)
        if part is work.parts[0]:
            coefficients.record(part, logps, nll)
            coefficients.settle()
        weighted = (coefficients.values[part.places] * logps).sum()
        return weighted if nll is None else weighted + nll_weight * nll.sum()

    if not work.parts:
        if trainee.policy.topology.is_last_stage:
            coefficients.settle()
        return
    temperature = coefficients.objective.config.temperature
    prompt = forward_prompt(trainee, work.prompt)
    if work.scored:
        with forward_only(trainee.policy.model):
            _schedule(trainee, work.scored, note, temperature=temperature, backward=False)
    _schedule(trainee, work.parts, weigh, temperature=temperature, backward=True)
    backward_prompt(trainee, prompt)


def _schedule(trainee: Trainee, parts: Sequence[Part], loss: LossOfPart, *, temperature: float, backward: bool) -> None:
    run_schedule(
        trainee,
        partial(_forward_part, trainee=trainee, loss=loss, temperature=temperature),
        parts,
        [part.layout.num_tokens for part in parts],
        backward=backward,
    )


def _forward_part(
    data_iterator: Iterator[Part], model: torch.nn.Module, *, trainee: Trainee, loss: LossOfPart, temperature: float
) -> tuple[Tensor, Any]:
    """Run a step of megatron-core's schedule.

    Returns hidden states, or the scalar to differentiate on the last pipeline stage.
    """
    part = next(data_iterator)
    output = stage_output(model, part.layout)
    if not trainee.policy.topology.is_last_stage:
        return output, None
    logps, nll = logprobs_and_nll(output, part.layout.packed, part.best, trainee.policy, temperature=temperature)
    return loss(part, logps, nll), _count_nothing


def _count_nothing(total: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the results of megatron-core's loss_func: the sum, a count of 0, an empty report.

    The count is 0 because the step counts whole groups.
    """
    return total.float(), torch.zeros((), dtype=torch.int, device=total.device), {}
