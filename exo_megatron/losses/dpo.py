"""DPO on the same groups: the forward KL, up to a constant (arXiv 2402.00856, Eq. 7 and 19)."""

from __future__ import annotations

import torch
from torch import Tensor


def dpo_loss(log_p_theta: Tensor, log_p_r: Tensor) -> Tensor:
    """- sum_k p_r,k log p_theta,k, Eq. 19. Both [..., K]; -inf in log_p_theta marks a missing candidate."""
    present = log_p_theta > float("-inf")
    return -(torch.where(present, log_p_r, float("-inf")).exp() * torch.where(present, log_p_theta, 0.0)).sum(dim=-1)


def dpo_pref_loss(log_ratio: Tensor, beta_pi: float) -> Tensor:
    """- log sigmoid(s_w - s_l), Eq. 7. log_ratio [..., 2], the chosen candidate first. Returns [...]."""
    return -torch.nn.functional.logsigmoid(beta_pi * (log_ratio[..., 0] - log_ratio[..., 1]))
