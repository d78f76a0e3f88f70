"""Theorems 3.1 to 3.3 of the paper on enumerated policies, with the package's losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exo_megatron import policy_log_probs, reward_log_target
from frontier.enumerated import (
    PROMPTS,
    Parameters,
    fit,
    gru_log_probs,
    kl,
    optimum,
    random_gru,
    random_worlds,
    standardise,
)
from frontier.sweep import LOSSES

BETAS = ((1.0, 1.0), (0.5, 1.0), (0.5, 0.3))
"""(beta_pi, beta_r)."""

HIDDEN = 4
MOVED = 0.15
"""Standard deviation of the noise that makes an arbitrary policy of pi_sft."""

NEWTON_STEPS = 80
"""Each halves the distance to the maximum."""

GROUPS_AT_ONCE, FEWEST_GROUPS, CANDIDATES_DRAWN = 4000, 4000, 400_000


@dataclass(frozen=True)
class Problem:
    """One world: pi_sft, another policy of the same form, and rewards with standard deviation 1 under pi_sft."""

    reference: Tensor
    policy: Parameters
    rewards: Tensor


def make_problem(*, seed: int) -> Problem:
    """Fit pi_sft to a random world's data, and move it a little."""
    world = random_worlds(range(seed, seed + 1))
    fitted = fit(random_gru(1, HIDDEN, seed=seed), world.data)
    reference = gru_log_probs(fitted)
    generator = torch.Generator().manual_seed(seed + 5)
    moved = {
        name: value + MOVED * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in fitted.items()
    }
    return Problem(reference, moved, standardise(world.rewards, reference, deviation=1.0))


@dataclass(frozen=True)
class OptimumError:
    """Theorem 3.1: the largest |log pi - log pi*_beta| of the policy that maximises the generalised objective."""

    beta_pi: float
    beta_r: float
    error: float


@dataclass(frozen=True)
class Cosine:
    """Theorems 3.2 and 3.3: cosine of a loss's mean gradient at K candidates with its exact gradient."""

    problem: int
    beta_pi: float
    beta_r: float
    K: int
    method: str
    cosine: float


def optimum_errors() -> list[OptimumError]:
    """Theorem 3.1 at several beta."""
    problem = make_problem(seed=0)
    return [OptimumError(*betas, optimum_error(problem, *betas)) for betas in BETAS]


def measure_cosines(seed: int, candidates: Sequence[int]) -> list[Cosine]:
    """Theorems 3.2 and 3.3 on the problem with this seed, for these K."""
    problem = make_problem(seed=seed)
    return [
        Cosine(seed, *betas, K, method, cosine)
        for betas in BETAS
        for K in candidates
        for method, cosine in cosines(problem, K, *betas).items()
    ]


def optimum_error(problem: Problem, beta_pi: float, beta_r: float) -> float:
    """See OptimumError.

    J(pi) = E[r] - beta_r KL(pi^(beta_pi) || pi_sft), both under pi^(beta_pi). The policy is a free table. Its gradient
    is divided by the probabilities (natural gradient), since that of a seldom output would vanish with it.
    """
    reference, rewards = problem.reference[0], problem.rewards[0]
    table = reference.clone().requires_grad_()
    for _ in range(NEWTON_STEPS):
        sharpened = generalised(table.log_softmax(dim=-1), reference, beta_pi)
        gain = (sharpened.exp() * (rewards - beta_r * (sharpened - reference))).sum()
        (gradient,) = torch.autograd.grad(gain, table)
        with torch.no_grad():
            table += 0.5 / (beta_pi**2 * beta_r) * gradient / sharpened.exp()
    return float((table.detach().log_softmax(dim=-1) - optimum(reference, rewards, beta_pi * beta_r)).abs().max())


def generalised(policy: Tensor, reference: Tensor, beta_pi: float) -> Tensor:
    """log pi^(beta_pi) = beta_pi log pi + (1 - beta_pi) log pi_sft, normalised, of log-probs [..., S]."""
    return (beta_pi * policy + (1 - beta_pi) * reference).log_softmax(dim=-1)


def exact_gradients(problem: Problem, beta_pi: float, beta_r: float) -> dict[str, Tensor]:
    """Gradients of what each method aims at with all outputs in place of K, by method.

    exo_rw: KL(pi^(beta_pi) || pi*_beta_r); dpo_rw: the same with its sides exchanged.
    """
    target = optimum(problem.reference, problem.rewards, beta_r)

    def gradient(method: str) -> Tensor:
        gru = {name: value.clone().requires_grad_() for name, value in problem.policy.items()}
        sharpened = generalised(gru_log_probs(gru), problem.reference, beta_pi)
        sides = (sharpened, target) if method == "exo_rw" else (target, sharpened)
        return _flat(torch.autograd.grad(kl(*sides).sum(), list(gru.values())))

    return {method: gradient(method) for method in LOSSES}


def cosines(problem: Problem, K: int, beta_pi: float, beta_r: float, *, seed: int = 1) -> dict[str, float]:
    """See Cosine; by method."""
    exact = exact_gradients(problem, beta_pi, beta_r)
    groups = max(CANDIDATES_DRAWN // K, FEWEST_GROUPS)
    found = {}
    for method in LOSSES:
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros_like(exact[method])
        for _ in range(groups // GROUPS_AT_ONCE):
            total += _sampled_gradient(problem, method, K, beta_pi, beta_r, generator)
        found[method] = float(torch.cosine_similarity(total, exact[method], dim=0))
    return found


def _sampled_gradient(
    problem: Problem, method: str, K: int, beta_pi: float, beta_r: float, generator: torch.Generator
) -> Tensor:
    gru = {name: value.clone().requires_grad_() for name, value in problem.policy.items()}
    prompts = torch.arange(PROMPTS).repeat_interleave(GROUPS_AT_ONCE // PROMPTS)
    reference, rewards = problem.reference[0], problem.rewards[0]
    candidates = torch.multinomial(reference.exp()[prompts], K, replacement=True, generator=generator)
    index = prompts[:, None] * reference.shape[-1] + candidates
    log_ratio = (gru_log_probs(gru)[0] - reference).reshape(-1)[index]
    log_p_r = reward_log_target(rewards.reshape(-1)[index], beta_r)
    loss = LOSSES[method](policy_log_probs(log_ratio, beta_pi), log_p_r).mean()
    return _flat(torch.autograd.grad(loss, list(gru.values())))


def _flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([gradient.reshape(-1) for gradient in gradients])
