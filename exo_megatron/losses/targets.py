"""The distribution p_r over a group's candidates that training aims at."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reward_log_target(rewards: Tensor, beta_r: float) -> Tensor:
    """log p_r = log softmax_k(r / beta_r), Eq. 14. rewards [..., K], -inf where there is no candidate."""
    return torch.log_softmax(rewards / beta_r, dim=-1)


def preference_log_target(like: Tensor, epsilon: float) -> Tensor:
    """log p_r of a smoothed one-hot on candidate 0: (1 - epsilon), and epsilon / (K - 1) on the others (Eq. 18).

    like [..., K] with K >= 2 gives shape, dtype and device.
    """
    others = like.shape[-1] - 1
    target = torch.full_like(like, math.log(epsilon / others))
    target[..., 0] = math.log1p(-epsilon)
    return target
