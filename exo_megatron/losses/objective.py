"""Alignment objective of one micro-batch: a loss per group, and the statistics to report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from exo_megatron.config.losses import FUNCTION, FUNCTION_KEYS, LOSSES, LossRow
from exo_megatron.config.sections import LossConfig
from exo_megatron.errors import ConfigError
from exo_megatron.losses.paper import (
    NO_CANDIDATE,
    dpo_loss,
    dpo_pref_loss,
    exo_loss,
    ipo_pref_loss,
    policy_log_probs,
    preference_log_target,
    reward_log_target,
)
from exo_megatron.utils.functions import load_user_function


@dataclass(frozen=True)
class RaggedGroups:
    """Places of the C candidates of G groups in [G, max K] matrices.

    Attributes:
        index: [G, max K] int64, the candidate's number 0..C-1; 0 where there is no candidate.
        mask: [G, max K] bool, True where the group has that candidate.
    """

    index: Tensor
    mask: Tensor

    @classmethod
    def of(cls, group_sizes: Sequence[int], device: torch.device) -> RaggedGroups:
        """Place the candidates of groups of these sizes K (at least one group) on the device."""
        width = max(group_sizes)
        sizes = torch.tensor(group_sizes).to(device, non_blocking=True)
        columns = torch.arange(width, device=device)
        mask = columns < sizes[:, None]
        first = sizes.cumsum(0) - sizes
        return cls(torch.where(mask, first[:, None] + columns, 0), mask)

    def pad(self, values: Tensor, fill: float) -> Tensor:
        """Spread values [C] over [G, max K], with `fill` for missing candidates; differentiable."""
        return torch.where(self.mask, values[self.index], fill)


@dataclass(frozen=True)
class TokenLogps:
    """Log-probs of the N candidate tokens of a micro-batch, in nats, at loss.temperature.

    All tensors are [N] and in one order.

    Attributes:
        candidate: int64, the number 0..C-1 of the candidate that the token belongs to.
        policy: log-probs under the policy, differentiable.
        reference, behaviour: log-probs under these policies; None where the data have none.
    """

    candidate: Tensor
    policy: Tensor
    reference: Tensor | None
    behaviour: Tensor | None


@dataclass(frozen=True)
class LossInputs:
    """Inputs of the losses of G groups. Tensors are [G, K] fp64, with K that of the largest group.

    Attributes:
        mask: bool, True where the group has that candidate.
        log_ratio: log pi_theta(y_k|x) - log pi_sft(y_k|x), differentiable; -inf where there is no
            candidate.
        rewards: -inf where there is no candidate; None for a loss that compares pairs, whose chosen
            candidate is the first.
        log_weights: 0 where there is no candidate; None unless the loss asks for them.
        tokens: per-token log-probs; None unless the loss asks for them.
        groups: places of the candidates [C] in [G, K].
        config: the keys of `loss`.
    """

    mask: Tensor
    log_ratio: Tensor
    rewards: Tensor | None
    log_weights: Tensor | None
    tokens: TokenLogps | None
    groups: RaggedGroups
    config: LossConfig

    @property
    def log_p_theta(self) -> Tensor:
        """log p_theta, Eq. 13."""
        return policy_log_probs(self.log_ratio, self.config.beta_pi)

    @property
    def log_p_r(self) -> Tensor:
        """log p_r: Eq. 14 where there are rewards, else the smoothed preference for candidate 0."""
        if self.rewards is None:
            return preference_log_target(self.log_ratio, self.config.label_smoothing)
        return reward_log_target(self.rewards, self.config.beta_r)


LossFunction: TypeAlias = Callable[[LossInputs], Tensor]
"""Losses [G], differentiable with respect to log_ratio and tokens.policy."""


@dataclass(frozen=True)
class Loss:
    """A loss: its row of the table in config/losses.py, and its function."""

    row: LossRow
    function: LossFunction

    def __call__(self, inputs: LossInputs) -> Tensor:
        """Compute the losses [G]."""
        return self.function(inputs)


_FUNCTIONS: Mapping[str, LossFunction] = {
    "exo_rw": lambda inputs: exo_loss(inputs.log_p_theta, inputs.log_p_r),
    "exo_pref": lambda inputs: exo_loss(inputs.log_p_theta, inputs.log_p_r),
    "dpo_rw": lambda inputs: dpo_loss(inputs.log_p_theta, inputs.log_p_r),
    "dpo_pref": lambda inputs: dpo_pref_loss(inputs.log_ratio, inputs.config.beta_pi),
    "ipo_pref": lambda inputs: ipo_pref_loss(inputs.log_ratio, inputs.config.beta_pi),
}


def join_table(rows: Mapping[str, LossRow], functions: Mapping[str, LossFunction]) -> dict[str, Loss]:
    """Join each row with its function. Raises RuntimeError for a kind that lacks either."""
    lonely = rows.keys() ^ functions.keys()
    if lonely:
        raise RuntimeError(f"kinds of loss without a row in config/losses.py or without a function: {sorted(lonely)}")
    return {kind: Loss(row, functions[kind]) for kind, row in rows.items()}


BUILT_IN = join_table(LOSSES, _FUNCTIONS)


def loss_row(**columns: Any) -> Callable[[LossFunction], Loss]:
    """Return a decorator that gives a user's loss function its row, such as
    `@loss_row(compares="preference")`.

    The keyword arguments are the fields of LossRow.
    """
    settings = {"equation": "", "compares": "rewards", "keys": FUNCTION_KEYS, **columns}
    return lambda function: Loss(LossRow(**settings), function)


def find_loss(config: LossConfig) -> Loss:
    """Find the loss that a configuration names.

    Raises ConfigError for a function that cannot be imported.
    """
    if config.kind != FUNCTION:
        return BUILT_IN[config.kind]
    found = load_user_function("loss.function", config.function or "", ConfigError)
    return found if isinstance(found, Loss) else loss_row()(found)


@dataclass(frozen=True)
class Objective:
    """Losses and statistics of a micro-batch.

    Attributes:
        losses: [G] fp64, differentiable.
        statistics: name -> sum over the G groups, detached scalars.
    """

    losses: Tensor
    statistics: dict[str, Tensor]


def group_objective(
    logps: Tensor,
    reference_logps: Tensor,
    rewards: Tensor | None,
    group_sizes: Sequence[int],
    config: LossConfig,
    *,
    loss: Loss | None = None,
    log_weights: Tensor | None = None,
    tokens: TokenLogps | None = None,
    best_nll: Tensor | None = None,
) -> Objective:
    """Compute the losses of G groups from the log-probs of their C candidates. No communication.

    Args:
        logps, reference_logps: [C] fp64, log pi_theta(y_k|x) and log pi_sft(y_k|x), in nats, at
            config.temperature.
        rewards: [C] fp64; required by a loss that compares rewards, not read by the others.
        group_sizes: K of each group, summing to C; 2 everywhere, the chosen candidate first, for
            pairs.
        config: the kind of loss and its constants.
        loss: result of `find_loss(config)`, if the caller already has it.
        log_weights: [C] fp64, for a loss that asks for them.
        tokens: per-token log-probs of all candidates, for a loss that asks for them.
        best_nll: [G] fp64, negative log-likelihood per token of each group's best candidate, in
            nats; added to the losses with the factor config.nll_weight.

    Raises:
        ValueError: rewards or log_weights are needed and missing.
        ConfigError: a user's loss function returns another shape than [G].
    """
    loss = loss or find_loss(config)
    if loss.row.compares == "rewards" and rewards is None:
        raise ValueError(f"{config.kind} needs rewards")
    if loss.row.log_weights and log_weights is None:
        raise ValueError(f"{config.kind} needs log-weights")
    groups = RaggedGroups.of(group_sizes, logps.device)
    inputs = LossInputs(
        mask=groups.mask,
        log_ratio=groups.pad(logps - reference_logps, NO_CANDIDATE),
        rewards=groups.pad(rewards, NO_CANDIDATE) if rewards is not None and loss.row.compares == "rewards" else None,
        log_weights=groups.pad(log_weights, 0.0) if log_weights is not None and loss.row.log_weights else None,
        tokens=tokens,
        groups=groups,
        config=config,
    )
    losses = loss(inputs)
    if losses.shape != (len(group_sizes),):
        raise ConfigError(
            f"loss.function {config.function}",
            f"returned shape {list(losses.shape)} for {len(group_sizes)} groups",
            expected=f"one loss per group, shape [{len(group_sizes)}]",
            fix="reduce over the candidates of a group, and over nothing else",
        )
    with torch.no_grad():
        statistics = group_statistics(inputs, groups.pad(logps, 0.0))
    if best_nll is not None:
        losses = losses + config.nll_weight * best_nll
        statistics[NLL] = best_nll.detach().sum()
    return Objective(losses, statistics)


class GroupQuantities:
    """Quantities of groups that several statistics share.

    Tensors are [G, K], or [G, 1] for one candidate. chosen and rejected are the candidates with the
    largest and smallest p_r, favourite the one with the largest p_theta.
    """

    def __init__(self, inputs: LossInputs, logps: Tensor) -> None:
        self.mask, self.log_ratio, self.logps = inputs.mask, inputs.log_ratio, logps
        self.log_p_theta, self.log_p_r = inputs.log_p_theta, inputs.log_p_r
        self.best = torch.where(self.mask, self.log_p_r, NO_CANDIDATE).argmax(dim=-1, keepdim=True)
        self.worst = torch.where(self.mask, self.log_p_r, -NO_CANDIDATE).argmin(dim=-1, keepdim=True)
        implicit = inputs.config.beta_pi * self.log_ratio
        self.chosen, self.rejected = implicit.gather(-1, self.best), implicit.gather(-1, self.worst)

    @cached_property
    def dead(self) -> Tensor:
        """True for groups in EXO's dead zone, where the gradient vanishes. [G, 1] bool.

        There log p_theta of the candidate b with the largest p_r is below log p_theta of the
        candidate a with the largest p_theta by more than log p_r,b - log p_r,a (for a pair: m <
        -m*).
        """
        favourite = self.log_p_theta.argmax(dim=-1, keepdim=True)
        lead = self.log_p_theta.gather(-1, self.best) - self.log_p_theta.gather(-1, favourite)
        wanted = self.log_p_r.gather(-1, self.best) - self.log_p_r.gather(-1, favourite)
        return (self.best != favourite) & (lead < -wanted)

    def expectation(self, probabilities: Tensor, values: Tensor) -> Tensor:
        """Sum probabilities * values [G, K] over all candidates of all groups."""
        return torch.where(self.mask, probabilities * values, 0.0).sum()


STATISTICS: dict[str, Callable[[GroupQuantities], Tensor]] = {
    "rewards/chosen": lambda groups: groups.chosen.sum(),
    "rewards/rejected": lambda groups: groups.rejected.sum(),
    "rewards/margins": lambda groups: (groups.chosen - groups.rejected).sum(),
    "rewards/accuracies": lambda groups: (groups.chosen > groups.rejected).double().sum(),
    "logps/chosen": lambda groups: groups.logps.gather(-1, groups.best).sum(),
    "logps/rejected": lambda groups: groups.logps.gather(-1, groups.worst).sum(),
    "exo/p_best": lambda groups: groups.log_p_theta.gather(-1, groups.best).exp().sum(),
    "exo/entropy_policy": lambda groups: -groups.expectation(groups.log_p_theta.exp(), groups.log_p_theta),
    "exo/entropy_reward": lambda groups: -groups.expectation(groups.log_p_r.exp(), groups.log_p_r),
    "exo/kl": lambda groups: groups.expectation(torch.softmax(groups.log_ratio, dim=-1), groups.log_ratio),
    "exo/dead_zone": lambda groups: groups.dead.double().sum(),
}
"""Name -> sum over groups, under TRL's names where TRL has one. All of them are reported.

rewards/* are implicit rewards beta_pi * log-ratio. exo/kl is the self-normalised importance
estimate of KL(pi_theta || pi_sft) from candidates of pi_sft: sum_k w_k log-ratio_k with w =
softmax(log-ratio).
"""

NLL = "nll_loss"
"""Statistic of loss.nll_weight, under TRL's name."""


def statistic_names(config: LossConfig) -> tuple[str, ...]:
    """List the statistics of `group_objective`, in the order in which ranks reduce them."""
    return (*STATISTICS, NLL) if config.nll_weight else tuple(STATISTICS)


def group_statistics(inputs: LossInputs, logps: Tensor) -> dict[str, Tensor]:
    """Compute all STATISTICS. logps [G, K]: log pi_theta(y_k|x), 0 where there is no candidate."""
    groups = GroupQuantities(inputs, logps)
    return {name: statistic(groups) for name, statistic in STATISTICS.items()}
