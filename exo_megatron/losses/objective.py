"""Alignment objective of one micro-batch: a loss per group, and the statistics to report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, get_args

import torch
from torch import Tensor

from exo_megatron.config.losses import FUNCTION, FUNCTION_KEYS, LOSSES, Compares, LossSpec
from exo_megatron.config.sections import LossConfig
from exo_megatron.errors import ConfigError, ExoError
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
from exo_megatron.utils.functions import load_user_function, raised


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
    """A loss: its entry of the table in config/losses.py, and its function."""

    spec: LossSpec
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


def join_table(specs: Mapping[str, LossSpec], functions: Mapping[str, LossFunction]) -> dict[str, Loss]:
    """Join each entry with its function. Raises RuntimeError for a kind that lacks either."""
    lonely = specs.keys() ^ functions.keys()
    if lonely:
        raise RuntimeError(
            f"kinds of loss without an entry in config/losses.py or without a function: {sorted(lonely)}"
        )
    return {kind: Loss(spec, functions[kind]) for kind, spec in specs.items()}


BUILT_IN = join_table(LOSSES, _FUNCTIONS)


def loss_spec(
    *,
    compares: Compares = "rewards",
    keys: Sequence[str] = FUNCTION_KEYS,
    log_weights: bool = False,
    token_logps: bool = False,
    several_rejected: bool = False,
) -> Callable[[LossFunction], Loss]:
    """Return a decorator that gives a user's loss function its LossSpec.

    Args:
        compares, log_weights, token_logps, several_rejected: as in LossSpec.
        keys: those of beta_pi, beta_r and label_smoothing that the loss uses; default: all.

    Raises ConfigError for a value that no loss can have.
    """
    if compares not in get_args(Compares):
        raise _spec_error("compares", compares, get_args(Compares))
    for key in keys:
        if key not in FUNCTION_KEYS:
            raise _spec_error("keys", key, FUNCTION_KEYS)
    spec = LossSpec("", compares, tuple(dict.fromkeys((FUNCTION, *keys))), log_weights, token_logps, several_rejected)
    return lambda function: Loss(spec, function)


def _spec_error(argument: str, value: object, accepted: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"loss_spec({argument}=...)",
        f"got {value!r}",
        expected=f"one of {', '.join(accepted)}",
        fix="correct the decorator of the loss",
    )


def find_loss(config: LossConfig) -> Loss:
    """Find the loss that a configuration names.

    Raises ConfigError for a function that cannot be imported, and for a key that it does not use.
    """
    if config.kind != FUNCTION:
        return BUILT_IN[config.kind]
    found = load_user_function("loss.function", config.function or "", ConfigError)
    loss = found if isinstance(found, Loss) else loss_spec()(found)
    for key in FUNCTION_KEYS:
        value = vars(config)[key]
        if key not in loss.spec.keys and value != LossConfig.model_fields[key].default:
            raise ConfigError(
                f"loss.{key}",
                f"got {value}, which {config.function} does not use",
                expected=f"keys that it uses: {', '.join(loss.spec.keys)}",
                fix=f"remove loss.{key}, or add it to the keys of its loss_spec",
            )
    return loss


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
    places: RaggedGroups | None = None,
    log_weights: Tensor | None = None,
    tokens: TokenLogps | None = None,
    best_nll: Tensor | None = None,
) -> Objective:
    """Compute the losses of G groups from the log-probs of their C candidates. No communication.

    Args:
        logps, reference_logps: [C] fp64, log pi_theta(y_k|x) and log pi_sft(y_k|x), in nats, at
            config.temperature.
        rewards: [C] fp64; required by a loss that compares rewards, not read by the others.
        group_sizes: K of each group, summing to C; for a preference at least 2, the chosen candidate
            first, and exactly 2 unless the loss takes several rejected ones.
        config: the kind of loss and its constants.
        loss: result of `find_loss(config)`, if the caller already has it.
        places: result of `RaggedGroups.of(group_sizes)` on the device, if the caller already has it.
        log_weights: [C] fp64, for a loss that asks for them.
        tokens: per-token log-probs of all candidates, for a loss that asks for them.
        best_nll: [G] fp64, negative log-likelihood per token of each group's best candidate, in
            nats; added to the losses with the factor config.nll_weight.

    Raises:
        ValueError: arguments that are missing for this loss, or do not belong together.
        ConfigError: a user's loss function fails, or returns something else than losses [G].
    """
    loss = loss or find_loss(config)
    _check_arguments(loss.spec, config, logps, rewards, group_sizes, log_weights, best_nll)
    groups = places or RaggedGroups.of(group_sizes, logps.device)
    inputs = LossInputs(
        mask=groups.mask,
        log_ratio=groups.pad(logps - reference_logps, NO_CANDIDATE),
        rewards=groups.pad(rewards, NO_CANDIDATE) if rewards is not None and loss.spec.compares == "rewards" else None,
        log_weights=groups.pad(log_weights, 0.0) if log_weights is not None and loss.spec.log_weights else None,
        tokens=tokens,
        groups=groups,
        config=config,
    )
    losses = loss(inputs) if config.kind != FUNCTION else _losses_of_user(loss, inputs)
    with torch.no_grad():
        statistics = group_statistics(inputs, groups.pad(logps, 0.0))
    if best_nll is not None:
        losses = losses + config.nll_weight * best_nll
        statistics[NLL] = best_nll.detach().sum()
    return Objective(losses, statistics)


def _check_arguments(
    spec: LossSpec,
    config: LossConfig,
    logps: Tensor,
    rewards: Tensor | None,
    group_sizes: Sequence[int],
    log_weights: Tensor | None,
    best_nll: Tensor | None,
) -> None:
    """Raise ValueError for arguments with which the loss would be another than the one asked for."""
    if spec.compares == "rewards" and rewards is None:
        raise ValueError(f"{config.kind} needs rewards")
    if spec.compares == "preference" and not spec.several_rejected and set(group_sizes) != {2}:
        raise ValueError(f"{config.kind} compares pairs, but group_sizes are {list(group_sizes)}")
    if spec.compares == "preference" and min(group_sizes) < 2:
        raise ValueError(f"{config.kind} compares two at least, but group_sizes are {list(group_sizes)}")
    if spec.log_weights and log_weights is None:
        raise ValueError(f"{config.kind} needs log-weights")
    if bool(config.nll_weight) != (best_nll is not None):
        raise ValueError(f"nll_weight {config.nll_weight} {'needs' if best_nll is None else 'does not use'} best_nll")
    if sum(group_sizes) != logps.shape[0]:
        raise ValueError(f"group_sizes sum to {sum(group_sizes)} for {logps.shape[0]} candidates")


def _losses_of_user(loss: Loss, inputs: LossInputs) -> Tensor:
    """Call a user's loss function. Raises ConfigError unless it returns losses [G] with a gradient."""
    where, count = f"loss.function {inputs.config.function}", inputs.mask.shape[0]
    expected, problem = f"one differentiable loss per group, shape [{count}]", None
    try:
        losses: object = loss(inputs)
    except (ExoError, torch.OutOfMemoryError, KeyboardInterrupt):
        raise
    # The user's function may raise anything; the message says where.
    except BaseException as error:
        raise ConfigError(where, raised(error), expected=expected, fix="correct the function") from error
    differentiable = inputs.log_ratio.requires_grad or (
        inputs.tokens is not None and inputs.tokens.policy.requires_grad
    )
    if not isinstance(losses, Tensor):
        problem = f"returned a {type(losses).__name__}"
    elif losses.shape != (count,):
        problem = f"returned shape {list(losses.shape)} for {count} groups"
    elif differentiable and not losses.requires_grad:
        problem = "returned losses that do not depend on the policy's log-probs, so that nothing would be trained"
    else:
        return losses.double()
    raise ConfigError(
        where,
        problem,
        expected=expected,
        fix="compute it from log_ratio or tokens.policy, and reduce over the candidates of a group only",
    )


class GroupQuantities:
    """Quantities of groups that several statistics share.

    Tensors are [G, K], or [G, 1] for one candidate. chosen and rejected are the candidates with the
    largest and smallest p_r, favourite the one with the largest p_theta.
    """

    def __init__(self, inputs: LossInputs, logps: Tensor) -> None:
        self.mask, self.log_ratio, self.logps = inputs.mask, inputs.log_ratio, logps
        self.log_p_theta, self.log_p_r = inputs.log_p_theta, inputs.log_p_r
        self.best = torch.where(self.mask, self.log_p_r, NO_CANDIDATE).argmax(dim=-1, keepdim=True)
        implicit = inputs.config.beta_pi * self.log_ratio
        worst = torch.where(self.mask, self.log_p_r, -NO_CANDIDATE)
        if inputs.rewards is None:
            # Rejected candidates are equal to p_r. Of several, the one that the policy likes most counts.
            worst = torch.where(torch.arange(worst.shape[-1], device=worst.device) > 0, -implicit, -NO_CANDIDATE)
        self.worst = worst.argmin(dim=-1, keepdim=True)
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
