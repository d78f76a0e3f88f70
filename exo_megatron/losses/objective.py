"""The alignment objective of one micro-batch: a loss per group and what dashboards show of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exo_megatron.config.sections import LossConfig
from exo_megatron.losses.dpo import dpo_loss, dpo_pref_loss
from exo_megatron.losses.exo import exo_loss, policy_log_probs
from exo_megatron.losses.ragged import RaggedGroups
from exo_megatron.losses.targets import preference_log_target, reward_log_target

NO_CANDIDATE = float("-inf")


@dataclass(frozen=True)
class Objective:
    """losses [G] fp64, differentiable; statistics: name -> sum over the G groups, detached scalars."""

    losses: Tensor
    statistics: dict[str, Tensor]


def group_objective(
    logps: Tensor, reference_logps: Tensor, rewards: Tensor | None, group_sizes: Sequence[int], config: LossConfig
) -> Objective:
    """Losses of G groups from the log-probs of their C candidates.

    logps, reference_logps [C] fp64: log pi_theta(y_k|x) and log pi_sft(y_k|x) at temperature config.temperature.
    rewards [C] fp64, required for exo_rw and dpo_rw. group_sizes: K of each group, summing to C; 2 everywhere, the
    chosen candidate first, for exo_pref and dpo_pref. No communication.
    """
    groups = RaggedGroups.of(group_sizes, logps.device)
    log_ratio = groups.pad(logps - reference_logps, NO_CANDIDATE)
    log_p_theta = policy_log_probs(log_ratio, config.beta_pi)
    if config.kind in ("exo_rw", "dpo_rw"):
        if rewards is None:
            raise ValueError(f"{config.kind} needs rewards")
        log_p_r = reward_log_target(groups.pad(rewards, NO_CANDIDATE), config.beta_r)
    else:
        log_p_r = preference_log_target(log_ratio, config.label_smoothing)
    if config.kind == "dpo_pref":
        losses = dpo_pref_loss(log_ratio, config.beta_pi)
    elif config.kind == "dpo_rw":
        losses = dpo_loss(log_p_theta, log_p_r)
    else:
        losses = exo_loss(log_p_theta, log_p_r)
    with torch.no_grad():
        padded = groups.pad(logps, 0.0)
        statistics = group_statistics(log_ratio, log_p_theta, log_p_r, padded, groups.mask, config.beta_pi)
    return Objective(losses, statistics)


def group_statistics(
    log_ratio: Tensor, log_p_theta: Tensor, log_p_r: Tensor, logps: Tensor, mask: Tensor, beta_pi: float
) -> dict[str, Tensor]:
    """Sums over groups, under TRL's names where TRL has one. All inputs [G, K].

    chosen and rejected are the candidates that p_r likes best and least; rewards/* are implicit rewards
    beta_pi * log-ratio. exo/kl is the self-normalised importance estimate of KL(pi_theta || pi_sft) from candidates
    of pi_sft: sum_k w_k log-ratio_k with w = softmax(log-ratio). A group is in EXO's dead zone when the candidate b
    that p_r likes best trails the candidate a that p_theta likes best by more than log p_r,b - log p_r,a
    (for a pair: m < -m*), where EXO's gradient vanishes.
    """
    best = torch.where(mask, log_p_r, NO_CANDIDATE).argmax(dim=-1, keepdim=True)
    worst = torch.where(mask, log_p_r, -NO_CANDIDATE).argmin(dim=-1, keepdim=True)
    favourite = log_p_theta.argmax(dim=-1, keepdim=True)
    implicit = beta_pi * log_ratio
    chosen, rejected = implicit.gather(-1, best), implicit.gather(-1, worst)
    lead = log_p_theta.gather(-1, best) - log_p_theta.gather(-1, favourite)
    wanted = log_p_r.gather(-1, best) - log_p_r.gather(-1, favourite)
    return {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "rewards/accuracies": (chosen > rejected).double().sum(),
        "logps/chosen": logps.gather(-1, best).sum(),
        "logps/rejected": logps.gather(-1, worst).sum(),
        "exo/p_best": log_p_theta.gather(-1, best).exp().sum(),
        "exo/entropy_policy": _entropy(log_p_theta, mask),
        "exo/entropy_reward": _entropy(log_p_r, mask),
        "exo/kl": _expectation(torch.softmax(log_ratio, dim=-1), log_ratio, mask),
        "exo/dead_zone": ((best != favourite) & (lead < -wanted)).double().sum(),
    }


def _entropy(log_p: Tensor, mask: Tensor) -> Tensor:
    return -_expectation(log_p.exp(), log_p, mask)


def _expectation(probabilities: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, probabilities * values, 0.0).sum()
