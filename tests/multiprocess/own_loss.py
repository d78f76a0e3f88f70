"""A loss from outside of the package that uses everything a loss can ask for: clipped policy gradient with weights."""

from __future__ import annotations

import torch
from torch import Tensor

from exo_megatron import LossInputs, loss_spec

CLIP, KL_WEIGHT = 0.2, 0.1


@loss_spec(compares="rewards", keys=(), log_weights=True, token_logps=True)
def clipped(inputs: LossInputs) -> Tensor:
    """Per group: sum_k w_k mean_t(- min(r_t A_k, clip(r_t) A_k) + KL_WEIGHT kl_t)."""
    tokens, weights, rewards = inputs.tokens, inputs.log_weights, inputs.rewards
    assert tokens is not None and tokens.reference is not None and tokens.behaviour is not None
    assert weights is not None and rewards is not None
    present = torch.where(inputs.mask, rewards, 0.0)
    mean = present.sum(dim=-1, keepdim=True) / inputs.mask.sum(dim=-1, keepdim=True)
    advantage = (present - mean)[inputs.mask][tokens.candidate]
    policy = tokens.policy.double()
    ratio = (policy - tokens.behaviour).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    gap = tokens.reference - policy
    values = -surrogate + KL_WEIGHT * (gap.exp() - gap - 1)
    zero = values.new_zeros(int(inputs.mask.sum()))
    sums = zero.index_add(0, tokens.candidate, values)
    counts = zero.index_add(0, tokens.candidate, torch.ones_like(values))
    return (weights.exp() * inputs.groups.pad(sums / counts, 0.0)).sum(dim=-1)


@loss_spec(keys=(), log_weights=True)
def weighted(inputs: LossInputs) -> Tensor:
    """Per group: - sum_k w_k r_k log-ratio_k, policy gradient with importance weights."""
    weights, rewards = inputs.log_weights, inputs.rewards
    assert weights is not None and rewards is not None
    return -torch.where(inputs.mask, weights.exp() * rewards * inputs.log_ratio, 0.0).sum(dim=-1)
