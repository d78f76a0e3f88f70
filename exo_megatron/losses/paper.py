"""The losses of the paper (arXiv 2402.00856), and IPO, as pure functions of log-probs and rewards.

x is a prompt, y_1..y_K its candidates, pi_theta the policy, pi_sft the reference. Tensors are [...,
K]; where a group has fewer candidates than others, the missing ones are -inf. No function here
communicates or reads a configuration.

    log_ratio_k  = log pi_theta(y_k|x) - log pi_sft(y_k|x)
    p_theta      = softmax_k(beta_pi * log_ratio_k)                       Eq. 13
    p_r          = softmax_k(r(x, y_k) / beta_r)                          Eq. 14
    EXO          = KL(p_theta || p_r)                                     Eq. 15, 18
    DPO          = KL(p_r || p_theta) up to a constant                    Eq. 19, 7
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NO_CANDIDATE = float("-inf")


def policy_log_probs(log_ratio: Tensor, beta_pi: float) -> Tensor:
    """Compute log p_theta = log softmax_k(beta_pi * log-ratio), Eq. 13. log_ratio [..., K]."""
    return torch.log_softmax(beta_pi * log_ratio, dim=-1)


def reward_log_target(rewards: Tensor, beta_r: float) -> Tensor:
    """Compute log p_r = log softmax_k(r / beta_r), Eq. 14. rewards [..., K]."""
    return torch.log_softmax(rewards / beta_r, dim=-1)


def preference_log_target(like: Tensor, epsilon: float) -> Tensor:
    """Compute log p_r of a smoothed one-hot target (Eq. 18), a tensor like `like` [..., K].

    The probability is 1 - epsilon on candidate 0 and epsilon / (K - 1) on the others, with the K >= 2
    of each group; it is 0 where a candidate of `like` is missing.
    """
    present = like > NO_CANDIDATE
    others = present.sum(dim=-1, keepdim=True).to(like.dtype) - 1
    target = torch.where(present, math.log(epsilon) - others.log(), NO_CANDIDATE)
    target[..., 0] = math.log1p(-epsilon)
    return target


def exo_loss(log_p_theta: Tensor, log_p_r: Tensor) -> Tensor:
    """Compute sum_k p_theta,k (log p_theta,k - log p_r,k), Eq. 15 (Eq. 18 for a preference target).

    Both [..., K], normalised over k; a missing candidate contributes 0. Returns [...]. The gradient
    goes through both factors p_theta: this is an exact expectation, not a sampled one.
    """
    present = log_p_theta > NO_CANDIDATE
    # Inner where: 0 * -inf would be NaN in the product and in its gradient.
    log_gap = torch.where(present, log_p_theta, 0.0) - torch.where(present, log_p_r, 0.0)
    return (log_p_theta.exp() * log_gap).sum(dim=-1)


def dpo_loss(log_p_theta: Tensor, log_p_r: Tensor) -> Tensor:
    """Compute -sum_k p_r,k log p_theta,k, Eq. 19.

    Both [..., K], normalised over k; a missing candidate contributes 0. Returns [...].
    """
    present = log_p_theta > NO_CANDIDATE
    target = torch.where(present, log_p_r, NO_CANDIDATE).exp()
    return -(target * torch.where(present, log_p_theta, 0.0)).sum(dim=-1)


def dpo_pref_loss(log_ratio: Tensor, beta_pi: float) -> Tensor:
    """Compute -log softmax(s)_w with s = beta_pi * log_ratio: for a pair -log sigmoid(s_w - s_l), Eq. 7.

    log_ratio [..., K], the chosen candidate first; a missing candidate contributes 0. Returns [...].
    """
    scores = beta_pi * log_ratio
    # Not log_softmax, which loses the digits of a small loss. For a pair the log-sum-exp is s_l itself.
    return -torch.nn.functional.logsigmoid(scores[..., 0] - scores[..., 1:].logsumexp(dim=-1))


def ipo_pref_loss(log_ratio: Tensor, beta_pi: float) -> Tensor:
    """Compute (log_ratio_w - log_ratio_l - 1 / (2 beta_pi))^2 (arXiv 2310.12036, Eq. 17).

    log_ratio [..., 2] of whole sequences, the chosen candidate first. Returns [...].
    """
    return (log_ratio[..., 0] - log_ratio[..., 1] - 1 / (2 * beta_pi)).square()


def sft_loss_sum(token_logps: Tensor) -> Tensor:
    """Compute the sum of the negative per-token log-probs [N], in nats, in fp64.

    The step divides it by the global number of tokens.
    """
    return -token_logps.double().sum()
