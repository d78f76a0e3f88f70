"""Our side of the benchmarks of training steps: the steps of `align`, as its Trainer runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from exo_megatron.config.sections import LossConfig, OptimizerConfig
from exo_megatron.data.groups import Group
from exo_megatron.execution.policy import Policy
from exo_megatron.training.objectives import AlignObjective, MicroBatchObjective
from exo_megatron.training.optimizer import Trainee, make_trainee
from exo_megatron.training.reference import add_logprobs
from exo_megatron.training.step import forward_gradients, plan_step, train_step
from tools.bench.models import Matched, hf_gradients

LEARNING_RATE = 1e-6
ADAM = OptimizerConfig(lr=LEARNING_RATE, beta2=0.95, clip_grad=1.0)


@dataclass(frozen=True)
class OurSteps:
    """A policy under training and a reference to compare it with, both `matched`."""

    matched: Matched
    trainee: Trainee
    reference: Policy
    objective: AlignObjective

    @classmethod
    def of(cls, matched: Matched, loss: LossConfig) -> OurSteps:
        """Load two copies of the matched model: the policy and the reference."""
        return cls(matched, make_trainee(matched.load(), ADAM), matched.load(), AlignObjective.of(loss))

    def stored(self, groups: Sequence[Group]) -> list[Group]:
        """Return the groups with their reference log-probs."""
        return add_logprobs(self.reference, groups, temperature=self.objective.config.temperature)

    def step(self, groups: Sequence[Group]) -> None:
        """Run one optimizer step; groups without reference log-probs get them first, from the
        live reference.
        """
        live = groups[0].reference_logprobs is None
        batches = plan_step(self.trainee, self.stored(groups) if live else groups, self.objective)
        train_step(
            self.trainee,
            batches.microbatches,
            self.objective,
            oversized=batches.oversized,
            learning_rate=LEARNING_RATE,
        )

    def gradients(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Compute the gradient of the mean loss over the groups, by HF's names."""
        backward(self.trainee, self.stored(groups), self.objective)
        return hf_gradients(self.trainee, self.matched)


def backward(trainee: Trainee, groups: Sequence[Group], objective: MicroBatchObjective) -> None:
    """Run the part of a step before Adam: packing, forward and backward, reduction."""
    batches = plan_step(trainee, groups, objective)
    forward_gradients(trainee, batches.microbatches, objective, batches.oversized)
