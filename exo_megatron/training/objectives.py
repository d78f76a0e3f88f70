"""What a micro-batch is trained on: SFT or alignment, as a sum over units and the number of units.

The step divides the gradient by the global number of units (groups or tokens), so value and gradient do not depend
on how groups were spread over ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from exo_megatron.config.sections import LossConfig
from exo_megatron.data.packing import MicroBatch
from exo_megatron.logprobs.sequence import sequence_logprobs
from exo_megatron.losses.objective import group_objective
from exo_megatron.losses.sft import sft_loss_sum
from exo_megatron.models.layout import GroupLayout

ALIGN_STATISTICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "exo/p_best",
    "exo/entropy_policy",
    "exo/entropy_reward",
    "exo/kl",
    "exo/dead_zone",
)


@dataclass(frozen=True)
class RowBatch:
    """One micro-batch on this rank's device. rewards and reference_logps: [C] fp64 where the objective needs them."""

    layout: GroupLayout
    rewards: Tensor | None
    reference_logps: Tensor | None

    @classmethod
    def of(cls, batch: MicroBatch, device: torch.device) -> RowBatch:
        """Move a packed micro-batch to the device."""
        rewards = [reward for group in batch.groups for reward in group.rewards or ()]
        reference = [logp for group in batch.groups for logp in group.reference_logprobs or ()]
        return cls(batch.layout.to(device), vector(rewards, device), vector(reference, device))


def vector(values: Sequence[float], device: torch.device) -> Tensor | None:
    """[n] fp64 on the device; None for no values."""
    return torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True) if values else None


@dataclass(frozen=True)
class UnitSum:
    """total: fp64 scalar, the loss summed over units, differentiable; count: units; statistics: sums over units."""

    total: Tensor
    count: int
    statistics: Mapping[str, Tensor]


class MicroBatchObjective(Protocol):
    """Pure function of one micro-batch's token log-probs."""

    @property
    def temperature(self) -> float:
        """Logits are divided by it."""
        ...

    @property
    def statistic_names(self) -> tuple[str, ...]:
        """Names of the statistics that every call returns, in the order they are reduced."""
        ...

    def __call__(self, token_logps: Tensor, batch: RowBatch) -> UnitSum:
        """token_logps [N] fp32 in the layout's token order."""
        ...


@dataclass(frozen=True)
class SftObjective:
    """Mean negative log-likelihood per response token."""

    temperature: float = 1.0
    statistic_names: tuple[str, ...] = ()

    def __call__(self, token_logps: Tensor, batch: RowBatch) -> UnitSum:
        """See MicroBatchObjective; the unit is the token."""
        return UnitSum(sft_loss_sum(token_logps), token_logps.shape[0], {})


@dataclass(frozen=True)
class AlignObjective:
    """Mean EXO or DPO loss per group."""

    loss: LossConfig
    statistic_names: tuple[str, ...] = ALIGN_STATISTICS

    @property
    def temperature(self) -> float:
        """tau of the paper."""
        return self.loss.temperature

    def __call__(self, token_logps: Tensor, batch: RowBatch) -> UnitSum:
        """See MicroBatchObjective; the unit is the group."""
        if batch.reference_logps is None:  # a rank's idle micro-batch: no group, but it takes part in the schedule
            zero = token_logps.double().sum()
            return UnitSum(zero, 0, {name: zero.detach() for name in self.statistic_names})
        logps = sequence_logprobs(token_logps, batch.layout)
        return self.of_candidates(logps, batch.reference_logps, batch.rewards, batch.layout.group_sizes)

    def of_candidates(
        self, logps: Tensor, reference_logps: Tensor, rewards: Tensor | None, group_sizes: Sequence[int]
    ) -> UnitSum:
        """The same from the log-probs [C] fp64 of the candidates of whole groups. See `group_objective`."""
        result = group_objective(logps, reference_logps, rewards, group_sizes, self.loss)
        return UnitSum(result.losses.sum(), result.losses.shape[0], result.statistics)
