"""What one micro-batch contributes to a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from exo_megatron.config.sections import LossConfig
from exo_megatron.data.groups import Group
from exo_megatron.data.packing import make_microbatch
from exo_megatron.errors import ConfigError
from exo_megatron.losses.objective import LossInputs, group_objective, loss_spec
from exo_megatron.training.objectives import AlignObjective, DeviceBatch, SftObjective

GROUPS = [
    Group("a", (3, 4), ((5, 2), (6, 7, 2)), rewards=(0.5, -0.5), reference_logprobs=(-3.0, -6.0)),
    Group("b", (3,), ((8, 2), (9, 2), (4, 5, 6, 2)), rewards=(1.0, 2.0, 0.0), reference_logprobs=(-4.0, -5.0, -9.0)),
    Group("c", (9, 9, 9), ((4, 2), (2,)), rewards=(0.0, 0.0), reference_logprobs=(-5.0, -2.0)),
]
LOSS = LossConfig(kind="exo_rw", beta_pi=0.5, beta_r=1.0, temperature=0.7)


class KnownPolicy:
    """A policy whose hidden states are log-probs already; it remembers the temperatures it was asked for."""

    def __init__(self) -> None:
        self.temperatures: list[float] = []

    def token_logprobs(self, hidden: Tensor, tokens: object, *, temperature: float) -> Tensor:
        self.temperatures.append(temperature)
        return hidden


class LogitPolicy:
    """A policy whose hidden states are logits [M, V]; it remembers its calls."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, int]] = []

    def token_logprobs(self, hidden: Tensor, tokens: Any, *, temperature: float, calls: int = 1) -> Tensor:
        self.asked.append((temperature, calls))
        return torch.log_softmax(hidden / temperature, dim=-1)[tokens.token_predictor, tokens.token_target]


def batch_of(groups: list[Group]) -> DeviceBatch:
    return DeviceBatch.of(make_microbatch(groups, multiple=4))


def logps_for(batch: DeviceBatch) -> Tensor:
    """A log-prob for each token that depends on the token and its position alone, not on the packing."""
    positions = batch.layout.position_ids[batch.layout.predict_index[batch.layout.token_predictor]]
    return (-0.1 * batch.layout.token_target - 0.3 * positions).float().requires_grad_()


def test_batch_keeps_rewards_and_reference_in_candidate_order() -> None:
    batch = batch_of(GROUPS)
    assert batch.rewards is not None and batch.reference_logps is not None
    assert batch.rewards.tolist() == [0.5, -0.5, 1.0, 2.0, 0.0, 0.0, 0.0]
    assert batch.reference_logps.tolist() == [-3.0, -6.0, -4.0, -5.0, -9.0, -5.0, -2.0]
    assert batch.rewards.dtype == batch.reference_logps.dtype == torch.float64


def test_align_sums_over_groups() -> None:
    """By definition: sequence sums from the same log-probs, losses of each group from losses/objective.py."""
    batch = batch_of(GROUPS)
    objective = AlignObjective.of(LOSS)
    policy = KnownPolicy()
    result = objective(logps_for(batch), batch, policy)
    sums = []
    for group in GROUPS:
        for candidate in group.candidates:
            places = range(len(group.prompt) - 1, len(group.prompt) - 1 + len(candidate))
            sums.append(sum(-0.1 * y - 0.3 * place for y, place in zip(candidate, places, strict=True)))
    expected = group_objective(
        torch.tensor(sums, dtype=torch.float64), batch.reference_logps, batch.rewards, (2, 3, 2), LOSS
    )
    assert result.count == 3
    assert result.total.item() == pytest.approx(expected.losses.sum().item(), rel=1e-6)
    assert result.statistics.keys() == set(objective.statistic_names)
    for name, value in result.statistics.items():
        assert value.item() == pytest.approx(expected.statistics[name].item(), rel=1e-5), name
    assert policy.temperatures == [0.7]


@pytest.mark.parametrize(("temperature", "asked"), [(0.7, [(0.7, 2), (1.0, 2)]), (1.0, [(1.0, 1)])])
def test_nll_of_the_best_candidates(temperature: float, asked: list[tuple[float, int]]) -> None:
    """At temperature 1, whatever tau is; computed once where both are 1, within the same memory where not."""
    loss = LOSS.model_copy(update={"temperature": temperature, "nll_weight": 0.25})
    batch = DeviceBatch.of(make_microbatch(GROUPS, multiple=4), with_best=True)
    logits = torch.randn(len(batch.layout.predict_index), 12, generator=torch.Generator().manual_seed(3)).double()
    policy = LogitPolicy()
    result = AlignObjective.of(loss)(logits, batch, policy)
    plain = AlignObjective.of(loss.model_copy(update={"nll_weight": 0.0}))(logits, batch_of(GROUPS), LogitPolicy())
    expected = 0.0
    for group, best in zip(GROUPS, (0, 1, 0), strict=True):
        number = sum(len(each.candidates) for each in GROUPS[: GROUPS.index(group)]) + best
        chosen = (batch.layout.token_candidate == number).nonzero()[:, 0].tolist()
        nll = 0.0
        for token in chosen:
            scores = logits[batch.layout.token_predictor[token]]
            nll -= (scores[batch.layout.token_target[token]] - scores.logsumexp(dim=-1)).item()
        assert len(chosen) == len(group.candidates[best])
        expected += nll / len(chosen)
    assert result.statistics["nll_loss"].item() == pytest.approx(expected, rel=1e-12)
    assert result.total.item() == pytest.approx(plain.total.item() + 0.25 * expected, rel=1e-12)
    assert policy.asked == asked


def broken(inputs: LossInputs) -> Tensor:
    return inputs.log_ratio[:, :2]


@loss_spec(log_weights=True, token_logps=True)
def reads_all(inputs: LossInputs) -> Tensor:
    tokens = inputs.tokens
    assert tokens is not None and tokens.reference is not None and tokens.behaviour is None
    assert inputs.log_weights is not None
    sums = torch.zeros(int(inputs.mask.sum()), dtype=torch.float64).index_add(0, tokens.candidate, tokens.policy)
    return inputs.groups.pad(sums, 0.0).sum(dim=-1)


def test_a_users_loss_is_tried_before_a_model_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"broken: returned shape \[2, 2\] for 2 groups"):
        AlignObjective.of(LossConfig(function=f"{__name__}:broken")).rehearse(GROUPS)
    full = [
        replace(
            group,
            log_weights=tuple(0.0 for _ in group.candidates),
            reference_token_logprobs=tuple(tuple(-1.0 for _ in candidate) for candidate in group.candidates),
        )
        for group in GROUPS
    ]
    AlignObjective.of(LossConfig(function=f"{__name__}:reads_all", nll_weight=0.5)).rehearse(full)


def test_splitting_a_batch_changes_nothing() -> None:
    """Totals, counts and statistics of three micro-batches add up to those of one."""
    objective = AlignObjective.of(LOSS)
    batches = [batch_of(GROUPS), *(batch_of([group]) for group in GROUPS)]
    whole, *parts = [objective(logps_for(batch), batch, KnownPolicy()) for batch in batches]
    assert sum(part.count for part in parts) == whole.count
    assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-12)
    for name, value in whole.statistics.items():
        assert sum(part.statistics[name].item() for part in parts) == pytest.approx(value.item(), rel=1e-12), name


def test_batch_without_groups_takes_part_in_the_schedule() -> None:
    """No loss, no count, zero statistics, but a graph for the backward pass to run through."""
    batch = batch_of([])
    objective = AlignObjective.of(LOSS)
    token_logps = torch.zeros(0, requires_grad=True)
    result = objective(token_logps, batch, KnownPolicy())
    assert result.count == 0 and result.total.item() == 0.0
    assert result.statistics.keys() == set(objective.statistic_names)
    assert not any(value.item() for value in result.statistics.values())
    result.total.backward()
    assert token_logps.grad is not None


def test_sft_counts_tokens() -> None:
    batch = batch_of([Group("a", (3, 4), ((5, 6, 2),)), Group("b", (3,), ((2,),))])
    token_logps = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    policy = KnownPolicy()
    result = SftObjective()(token_logps, batch, policy)
    assert result.total.item() == 10.0 and result.count == 4 and not result.statistics
    assert policy.temperatures == [1.0]
