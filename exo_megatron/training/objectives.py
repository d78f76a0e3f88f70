"""The objective of a micro-batch, SFT or alignment, as a sum over units and the number of units.

The step divides the gradient by the global number of units (groups or tokens), so value and
gradient do not depend on how groups were spread over ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from exo_megatron.config.losses import FUNCTION
from exo_megatron.config.sections import LossConfig
from exo_megatron.data.groups import Group
from exo_megatron.data.packing import MicroBatch, make_microbatch
from exo_megatron.execution.policy import Policy
from exo_megatron.logprobs.vocab_parallel import sequence_logprobs
from exo_megatron.losses.objective import Loss, RaggedGroups, TokenLogps, find_loss, group_objective, statistic_names
from exo_megatron.losses.paper import sft_loss_sum
from exo_megatron.models.layouts.groups import GroupLayout


@dataclass(frozen=True)
class BestCandidates:
    """The tokens of each group's best candidate: the one with the highest reward, or the first of a
    pair.

    Attributes:
        tokens: [n] int64, these tokens among all tokens of the layout.
        index: [m] int64, the hidden states that predict these tokens, among the predicting ones of
            the layout.
        token_predictor, token_target: [n] int64 as in GroupLayout, but predictors are counted among
            these m.
        group: [n] int64, the group that each token belongs to.
        lengths: [G] fp64, tokens of each best candidate.
    """

    tokens: Tensor
    index: Tensor
    token_predictor: Tensor
    token_target: Tensor
    group: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, best: Sequence[tuple[int, int]], layout: GroupLayout) -> BestCandidates:
        """Find the tokens of the best candidates.

        Args:
            best: number in the layout, ascending, and length of each best candidate.
            layout: the layout of the micro-batch, on the CPU.
        """
        numbers = torch.tensor([number for number, _ in best], dtype=torch.int64)
        tokens = torch.isin(layout.token_candidate, numbers).nonzero()[:, 0]
        index, predictor = torch.unique(layout.token_predictor[tokens], return_inverse=True)
        group = torch.searchsorted(numbers, layout.token_candidate[tokens])
        lengths = torch.tensor([length for _, length in best], dtype=torch.float64)
        return cls(tokens, index, predictor, layout.token_target[tokens], group, lengths)

    def nll(self, token_logps: Tensor) -> Tensor:
        """Compute -log pi(y|x) per token of each best candidate, [G] fp64, from the log-probs [n] of
        their tokens.
        """
        sums = token_logps.new_zeros(self.lengths.shape, dtype=torch.float64)
        return sums.index_add(0, self.group, -token_logps.double()) / self.lengths


def logprobs_and_nll(
    hidden: Tensor, layout: GroupLayout, best: BestCandidates | None, policy: Policy, *, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """Compute the log-probs [N] at a temperature, and the best candidates' likelihood at temperature 1.

    hidden [M, H]: output of the last pipeline stage for the layout. One all-gather over the tensor
    group for each temperature.
    """
    if best is None:
        return policy.token_logprobs(hidden, layout, temperature=temperature), None
    if temperature == 1:
        token_logps = policy.token_logprobs(hidden, layout, temperature=1.0)
        return token_logps, best.nll(token_logps[best.tokens])
    token_logps = policy.token_logprobs(hidden, layout, temperature=temperature, calls=2)
    return token_logps, best.nll(policy.token_logprobs(hidden[best.index], best, temperature=1.0, calls=2))


def best_candidate(group: Group) -> int:
    """Return the number of the candidate with the highest reward (the first of equals), or 0,
    the chosen one of a pair.
    """
    return 0 if group.rewards is None else group.rewards.index(max(group.rewards))


def _list_best(groups: Sequence[Group]) -> list[tuple[int, int]]:
    """List the best candidates' numbers in the micro-batch, and their lengths."""
    found, before = [], 0
    for group in groups:
        best = best_candidate(group)
        found.append((before + best, len(group.candidates[best])))
        before += len(group.candidates)
    return found


@dataclass(frozen=True)
class DeviceBatch:
    """The tensors of one micro-batch. Floats are fp64, and None where the data have none.

    Attributes:
        layout: index tensors of the micro-batch.
        places: places of the candidates in a matrix of groups; None without groups.
        rewards, reference_logps, log_weights: [C].
        reference_tokens, behaviour_tokens: [N], in the layout's token order.
        best: the best candidates, for loss.nll_weight.
    """

    layout: GroupLayout
    places: RaggedGroups | None
    rewards: Tensor | None
    reference_logps: Tensor | None
    log_weights: Tensor | None
    reference_tokens: Tensor | None
    behaviour_tokens: Tensor | None
    best: BestCandidates | None

    @classmethod
    def of(cls, batch: MicroBatch, *, with_best: bool = False) -> DeviceBatch:
        """Make the tensors of a micro-batch, on the CPU. with_best: also find the best candidates.

        `to_device` then copies those of a whole step at once.
        """
        groups, layout = batch.groups, batch.layout
        return cls(
            layout=layout,
            places=RaggedGroups.of(layout.group_sizes, torch.device("cpu")) if groups else None,
            rewards=vector(chain.from_iterable(group.rewards or () for group in groups)),
            reference_logps=vector(chain.from_iterable(group.reference_logprobs or () for group in groups)),
            log_weights=vector(chain.from_iterable(group.log_weights or () for group in groups)),
            reference_tokens=_token_vector((group.reference_token_logprobs for group in groups), layout.token_order),
            behaviour_tokens=_token_vector((group.behaviour_token_logprobs for group in groups), layout.token_order),
            best=BestCandidates.of(_list_best(groups), layout) if with_best and groups else None,
        )


def vector(values: Iterable[float]) -> Tensor | None:
    """Make a tensor [n] fp64 on the CPU; None for no values."""
    listed = list(values)
    return torch.tensor(listed, dtype=torch.float64) if listed else None


def _token_vector(groups: Iterable[tuple[tuple[float, ...], ...] | None], order: Tensor) -> Tensor | None:
    """Make a tensor [N] fp64 of per-token values of groups, in the layout's token order, on the CPU.

    The values are given candidate after candidate; None for no values.
    """
    values = [value for group in groups for candidate in group or () for value in candidate]
    return torch.tensor(values, dtype=torch.float64)[order] if values else None


@dataclass(frozen=True)
class UnitSum:
    """Sums over the units (groups or tokens) of a micro-batch.

    Attributes:
        total: fp64 scalar, the loss summed over units, differentiable.
        count: number of units.
        statistics: name -> sum over units, detached.
    """

    total: Tensor
    count: int
    statistics: Mapping[str, Tensor]


class MicroBatchObjective(Protocol):
    """A function of one micro-batch's log-probs."""

    @property
    def statistic_names(self) -> tuple[str, ...]:
        """Names of the statistics that every call returns, in the order of their reduction."""
        ...

    @property
    def needs_best(self) -> bool:
        """True if micro-batches must know the best candidates of their groups."""
        ...

    def __call__(self, hidden: Tensor, batch: DeviceBatch, policy: Policy) -> UnitSum:
        """Compute the loss from hidden [M, H], the output of the last pipeline stage."""
        ...


@dataclass(frozen=True)
class SftObjective:
    """Mean negative log-likelihood per candidate token, at temperature 1."""

    statistic_names: tuple[str, ...] = ()
    needs_best: bool = False

    def __call__(self, hidden: Tensor, batch: DeviceBatch, policy: Policy) -> UnitSum:
        """See MicroBatchObjective; the unit is the token."""
        token_logps = policy.token_logprobs(hidden, batch.layout, temperature=1.0)
        return UnitSum(sft_loss_sum(token_logps), token_logps.shape[0], {})


@dataclass(frozen=True)
class AlignObjective:
    """Mean loss per group, with the log-probs at the paper's temperature tau."""

    config: LossConfig
    loss: Loss

    @classmethod
    def of(cls, config: LossConfig) -> AlignObjective:
        """Find the loss that a configuration names."""
        return cls(config, find_loss(config))

    def rehearse(self, groups: Sequence[Group]) -> None:
        """Compute a loss of the user's for the first two groups, with all log-probs 0, without a model.

        Raises ConfigError for a function that fails, before the long work of a run.
        """
        if self.config.kind != FUNCTION:
            return
        few = groups[:2]
        candidates = [candidate for group in few for candidate in group.candidates]
        lengths = torch.tensor([len(candidate) for candidate in candidates])
        zeros = torch.zeros(len(candidates), dtype=torch.float64)
        per_token = torch.zeros(int(lengths.sum()), dtype=torch.float64)
        given = DeviceBatch.of(make_microbatch(few, multiple=1))
        tokens = TokenLogps(
            torch.arange(len(candidates)).repeat_interleave(lengths),
            per_token.clone().requires_grad_(),
            per_token if given.reference_tokens is not None else None,
            per_token if given.behaviour_tokens is not None else None,
        )
        with torch.enable_grad():
            self.of_candidates(
                zeros.clone().requires_grad_(),
                zeros,
                given.rewards,
                [len(group.candidates) for group in few],
                log_weights=given.log_weights,
                tokens=tokens if self.loss.spec.token_logps else None,
                best_nll=zeros[: len(few)] if self.needs_best else None,
            )

    @property
    def statistic_names(self) -> tuple[str, ...]:
        """See MicroBatchObjective."""
        return statistic_names(self.config)

    @property
    def needs_best(self) -> bool:
        """See MicroBatchObjective."""
        return self.config.nll_weight > 0

    def __call__(self, hidden: Tensor, batch: DeviceBatch, policy: Policy) -> UnitSum:
        """See MicroBatchObjective; the unit is the group."""
        token_logps, best_nll = logprobs_and_nll(
            hidden, batch.layout, batch.best, policy, temperature=self.config.temperature
        )
        if batch.reference_logps is None:  # a rank's idle micro-batch: no group, but it takes part in the schedule
            zero = token_logps.double().sum()
            return UnitSum(zero, 0, {name: zero.detach() for name in self.statistic_names})
        tokens = None
        if self.loss.spec.token_logps:
            candidate = batch.layout.token_candidate
            tokens = TokenLogps(candidate, token_logps, batch.reference_tokens, batch.behaviour_tokens)
        return self.of_candidates(
            sequence_logprobs(token_logps, batch.layout),
            batch.reference_logps,
            batch.rewards,
            batch.layout.group_sizes,
            places=batch.places,
            log_weights=batch.log_weights,
            tokens=tokens,
            best_nll=best_nll,
        )

    def of_candidates(
        self,
        logps: Tensor,
        reference_logps: Tensor,
        rewards: Tensor | None,
        group_sizes: Sequence[int],
        *,
        places: RaggedGroups | None = None,
        log_weights: Tensor | None = None,
        tokens: TokenLogps | None = None,
        best_nll: Tensor | None = None,
    ) -> UnitSum:
        """Compute the same from log-probs [C] fp64 of the candidates of whole groups.

        See `group_objective`.
        """
        result = group_objective(
            logps,
            reference_logps,
            rewards,
            group_sizes,
            self.config,
            loss=self.loss,
            places=places,
            log_weights=log_weights,
            tokens=tokens,
            best_nll=best_nll,
        )
        return UnitSum(result.losses.sum(), result.losses.shape[0], result.statistics)
