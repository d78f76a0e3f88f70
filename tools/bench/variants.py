"""Training steps of ours with some of their ideas switched off, to see what each is worth.

All compute the same loss and gradient with the same model, kernels, log-probs and optimizer. Off
are: shared prompts (every candidate is a sequence of its own, its prompt repeated), packing (a
micro-batch is one group), the response-only output layer (every position is projected onto the
vocabulary, as other trainers do). The reference is live and runs with the same layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exo_megatron.data.groups import Group
from exo_megatron.data.packing import MicroBatch, make_microbatch, plan_microbatches
from exo_megatron.diagnosis.likelihood import unshared
from exo_megatron.execution.forward import forward_only, stage_output
from exo_megatron.execution.policy import Policy
from exo_megatron.logprobs.vocab_parallel import sequence_logprobs
from exo_megatron.models.layouts.groups import GroupLayout
from exo_megatron.parallel.upload import to_device
from exo_megatron.training.objectives import AlignObjective, DeviceBatch, UnitSum
from exo_megatron.training.step import forward_gradients, train_step
from tools.bench.models import hf_gradients
from tools.bench.training import LEARNING_RATE, OurSteps

UNUSED = -1
"""Candidate number of the positions that are projected for nothing."""


@dataclass(frozen=True)
class EveryPosition:
    """An AlignObjective on micro-batches that also project positions which predict no candidate.

    See MicroBatchObjective.
    """

    objective: AlignObjective
    needs_best: bool = False

    @property
    def statistic_names(self) -> tuple[str, ...]:
        """See MicroBatchObjective."""
        return self.objective.statistic_names

    def __call__(self, hidden: Tensor, batch: DeviceBatch, policy: Policy) -> UnitSum:
        """See MicroBatchObjective."""
        assert batch.reference_logps is not None  # `Variant` computes them
        logps = self.candidate_logps(hidden, batch.layout, policy)
        return self.objective.of_candidates(logps, batch.reference_logps, batch.rewards, batch.layout.group_sizes)

    def candidate_logps(self, hidden: Tensor, layout: GroupLayout, policy: Policy) -> Tensor:
        """Compute log pi(y_k|x) of the candidates, [C] fp64."""
        of_all = policy.token_logprobs(hidden, layout, temperature=self.objective.config.temperature)
        return sequence_logprobs(of_all[layout.token_candidate != UNUSED], layout)


@dataclass(frozen=True)
class Variant:
    """Steps with ideas switched on and off, with a live reference."""

    ours: OurSteps
    shared: bool
    packed: bool

    @property
    def objective(self) -> EveryPosition:
        """The objective of these steps."""
        return EveryPosition(self.ours.objective)

    def step(self, groups: Sequence[Group]) -> None:
        """Run one optimizer step."""
        train_step(self.ours.trainee, self._batches(groups), self.objective, learning_rate=LEARNING_RATE)

    def gradients(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Compute the gradient of the mean loss over the groups, by HF's names."""
        forward_gradients(self.ours.trainee, self._batches(groups), self.objective)
        return hf_gradients(self.ours.trainee, self.ours.matched)

    def _batches(self, groups: Sequence[Group]) -> list[DeviceBatch]:
        policy = self.ours.trainee.policy
        plan = [[i] for i in range(len(groups))]
        if self.packed:
            (plan,) = plan_microbatches(
                groups,
                data_size=1,
                max_tokens=policy.compute.max_tokens_per_microbatch,
                multiple=1,
                hidden_size=policy.spec.hidden_size,
            )
        device = policy.topology.device
        return [
            self._with_reference(to_device(DeviceBatch.of(self._lay_out([groups[i] for i in each])), device))
            for each in plan
        ]

    def _lay_out(self, groups: Sequence[Group]) -> MicroBatch:
        layout = make_microbatch(groups if self.shared else unshared(groups), multiple=1).layout
        layout = replace(layout, group_sizes=tuple(len(group.candidates) for group in groups))
        return MicroBatch(tuple(groups), project_every_position(layout))

    def _with_reference(self, batch: DeviceBatch) -> DeviceBatch:
        reference = self.ours.reference
        with forward_only(reference.model):
            hidden = stage_output(reference.model, batch.layout)
            logps = self.objective.candidate_logps(hidden, batch.layout, reference)
        return replace(batch, reference_logps=logps)


def project_every_position(layout: GroupLayout) -> GroupLayout:
    """Return a layout in which every token predicts one: those that predict no candidate's token
    predict token 0, of candidate UNUSED.
    """
    place = layout.predict_index[layout.token_predictor]
    idle = torch.ones(layout.num_tokens, dtype=torch.bool)
    idle[place] = False
    rest = idle.nonzero()[:, 0]
    zeros = torch.zeros_like(rest)
    predictor = torch.cat([place, rest])
    order = predictor.argsort(stable=True)  # a candidate's own tokens keep their order
    return replace(
        layout,
        predict_index=torch.arange(layout.num_tokens),
        token_predictor=predictor[order],
        token_target=torch.cat([layout.token_target, zeros])[order],
        token_candidate=torch.cat([layout.token_candidate, zeros + UNUSED])[order],
    )
