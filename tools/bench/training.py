"""Our side of the benchmarks of training steps: the steps of `align`, as its Trainer runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from exo_megatron.config.sections import LossConfig, OptimizerConfig
from exo_megatron.data.groups import Group
from exo_megatron.training.batches import step_batches
from exo_megatron.training.objectives import AlignObjective, MicroBatchObjective
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
        batches = step_batches(self.trainee, self.stored(groups) if live else groups)
        train_step(self.trainee, batches.rows, self.objective, oversized=batches.oversized, learning_rate=LEARNING_RATE)

    def gradients(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Gradient of the mean loss over the groups, by HF's names."""
        backward(self.trainee, self.stored(groups), self.objective)
        return hf_gradients(self.trainee, self.matched)


def backward(trainee: Trainee, groups: Sequence[Group], objective: MicroBatchObjective) -> None:
    """What a step does before Adam: packing, forward and backward, reduction."""
    batches = step_batches(trainee, groups)
    forward_gradients(trainee, batches.rows, objective, batches.oversized)
