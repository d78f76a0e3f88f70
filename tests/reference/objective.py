"""The objectives of the EXO paper (arXiv 2402.00856), one separate row per candidate, one group at a time.

Notation: s_k = beta_pi (log pi_theta(y_k|x) - log pi_sft(y_k|x)); p_theta = softmax_k(s); p_r = softmax_k(r / beta_r).
Log-probs are sums over all tokens of a candidate, the end-of-sequence token included, with logits of both models
divided by the temperature tau.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

LossKind = Literal["exo_rw", "exo_pref", "dpo_rw", "dpo_pref", "ipo_pref"]


@dataclass(frozen=True)
class ReferenceGroup:
    """A prompt, its candidates (candidate 0 is the chosen one of a pair) and their rewards, as plain numbers."""

    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    rewards: tuple[float, ...]


@dataclass(frozen=True)
class Objective:
    """A loss and its constants. label_smoothing: epsilon. nll_weight: lambda, of the best candidate's likelihood."""

    kind: LossKind
    beta_pi: float
    beta_r: float
    label_smoothing: float
    temperature: float
    nll_weight: float = 0.0


def token_logprobs(model: LlamaForCausalLM, prompt: Sequence[int], candidate: Sequence[int], tau: float) -> Tensor:
    """[R] log-probs of a candidate's tokens, from a forward pass over the row prompt + candidate alone."""
    row = torch.tensor([[*prompt, *candidate]])
    logits = model(input_ids=row, use_cache=False).logits[0].float()
    predicting = logits[len(prompt) - 1 : -1]
    logprobs = torch.log_softmax(predicting / tau, dim=-1)
    return logprobs.gather(-1, torch.tensor(candidate)[:, None])[:, 0]


def candidate_logprobs(model: LlamaForCausalLM, group: ReferenceGroup, tau: float) -> Tensor:
    """[K] sequence log-probs."""
    return torch.stack([token_logprobs(model, group.prompt, y, tau).sum() for y in group.candidates])


def group_loss(policy: Tensor, reference: Tensor, rewards: Tensor, objective: Objective) -> Tensor:
    """Loss of one group from [K] log-probs of policy and reference and [K] rewards."""
    s = objective.beta_pi * (policy - reference)
    if objective.kind == "ipo_pref":  # arXiv 2310.12036, Eq. 17
        log_ratio = policy - reference
        return (log_ratio[0] - log_ratio[1] - 1 / (2 * objective.beta_pi)) ** 2
    if objective.kind == "dpo_pref":  # Eq. 7
        return -torch.log(torch.sigmoid(s[0] - s[1]))
    log_p = torch.log_softmax(s, dim=0)  # Eq. 13
    if objective.kind == "exo_pref":  # Eq. 18
        target = torch.tensor([1.0 - objective.label_smoothing, objective.label_smoothing], dtype=s.dtype)
    else:
        target = torch.softmax(rewards / objective.beta_r, dim=0)  # Eq. 14
    if objective.kind == "dpo_rw":  # Eq. 19
        return -(target * log_p).sum()
    return (log_p.exp() * (log_p - target.log())).sum()  # Eq. 15


def best_nll(model: LlamaForCausalLM, group: ReferenceGroup) -> Tensor:
    """Negative log-likelihood per token, at temperature 1, of the candidate with the highest reward.

    For a pair, whose rewards are equal here, that is the first, the chosen one.
    """
    best = max(range(len(group.candidates)), key=lambda k: group.rewards[k])
    return -token_logprobs(model, group.prompt, group.candidates[best], 1.0).mean()


def align_loss(
    model: LlamaForCausalLM, reference: LlamaForCausalLM, groups: Sequence[ReferenceGroup], objective: Objective
) -> Tensor:
    """Mean over the groups of their losses, differentiable with respect to `model`."""
    losses = []
    for group in groups:
        with torch.no_grad():
            ref = candidate_logprobs(reference, group, objective.temperature)
        policy = candidate_logprobs(model, group, objective.temperature)
        loss = group_loss(policy, ref, torch.tensor(group.rewards), objective)
        losses.append(loss + objective.nll_weight * best_nll(model, group) if objective.nll_weight else loss)
    return torch.stack(losses).mean()


def sft_loss(model: LlamaForCausalLM, groups: Sequence[ReferenceGroup]) -> Tensor:
    """Mean over all tokens of the groups' first candidates of the negative log-likelihood, at temperature 1."""
    return -torch.cat([token_logprobs(model, group.prompt, group.candidates[0], 1.0) for group in groups]).mean()
