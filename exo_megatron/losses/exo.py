"""EXO: the reverse KL from p_theta to p_r over a group's candidates (arXiv 2402.00856, Eq. 15 and 18)."""

from __future__ import annotations

import torch
from torch import Tensor


def policy_log_probs(log_ratio: Tensor, beta_pi: float) -> Tensor:
    """log p_theta = log softmax_k(beta_pi * log-ratio), Eq. 13. log_ratio [..., K], -inf for a missing candidate."""
    return torch.log_softmax(beta_pi * log_ratio, dim=-1)


def exo_loss(log_p_theta: Tensor, log_p_r: Tensor) -> Tensor:
    """sum_k p_theta,k (log p_theta,k - log p_r,k), Eq. 15; with a preference target, Eq. 18.

    Both [..., K], normalised over k; -inf in log_p_theta marks a missing candidate, which contributes 0.
    Returns [...]. The gradient goes through both factors p_theta: this is an exact expectation, not a sampled one.
    """
    present = log_p_theta > float("-inf")
    # Inner where: 0 * -inf would be NaN in the product and in its gradient.
    log_gap = torch.where(present, log_p_theta, 0.0) - torch.where(present, log_p_r, 0.0)
    return (log_p_theta.exp() * log_gap).sum(dim=-1)
