"""Our side of the benchmarks of training steps: the steps of `align`, as its Trainer runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from exo_megatron.config.sections import ComputeConfig, LossConfig, OptimizerConfig
from exo_megatron.data.groups import Group
from exo_megatron.data.packing import make_microbatch, plan_microbatches
from exo_megatron.training.objectives import AlignObjective, RowBatch
from exo_megatron.training.optimizer import Trainee, make_trainee
from exo_megatron.training.reference import ReferenceModel
from exo_megatron.training.step import forward_gradients, train_step
from tools.bench.models import Matched, hf_gradients

LEARNING_RATE = 1e-6
ADAM = OptimizerConfig(lr=LEARNING_RATE, beta2=0.95, clip_grad=1.0)


@dataclass(frozen=True)
class OurSteps:
    """A policy under training and a reference to compare it with, both `matched`."""

    matched: Matched
    trainee: Trainee
    reference: ReferenceModel
    objective: AlignObjective

    @classmethod
    def of(cls, matched: Matched, loss: LossConfig) -> OurSteps:
        """Two copies of the matched model."""
        policy, compute, spec, topology = matched.load(), matched.compute, matched.spec, matched.topology
        trainee = make_trainee(policy, spec, topology, compute, ADAM)
        reference = ReferenceModel(matched.load(), spec, topology, compute, loss.temperature)
        return cls(matched, trainee, reference, AlignObjective(loss))

    def stored(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with their reference log-probs."""
        return self.reference.complete(groups)

    def step(self, groups: Sequence[Group]) -> None:
        """One optimizer step; groups without reference log-probs get them first, from the live reference."""
        live = groups[0].reference_logprobs is None
        completed = self.stored(groups) if live else groups
        train_step(self.trainee, self.pack(completed), self.objective, learning_rate=LEARNING_RATE)

    def gradients(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Gradient of the mean loss over the groups, by HF's names."""
        reports = forward_gradients(self.trainee, self.pack(self.stored(groups)), self.objective)
        assert sum(report.count for report in reports) == len(groups)
        return {name: gradient.clone() for name, gradient in hf_gradients(self.trainee, self.matched).items()}

    def pack(self, groups: Sequence[Group]) -> list[RowBatch]:
        """Micro-batches of one step."""
        compute: ComputeConfig = self.matched.compute
        plan = plan_microbatches(
            groups,
            data_size=1,
            max_tokens=compute.max_tokens_per_microbatch,
            multiple=1,
            hidden_size=self.matched.spec.hidden_size,
        )
        return [
            RowBatch.of(make_microbatch([groups[i] for i in row], multiple=1), self.matched.topology.device)
            for row in plan[0]
        ]
