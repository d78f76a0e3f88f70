"""Policies over so few outputs that every expectation, KL and gradient is exact: T words out of V after P prompts.

A policy is a GRU that is walked along the tree of all prefixes. R of them are computed at once, each with its own
rewards (a world). Shapes: R worlds, P prompts, S = V^T outputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PROMPTS, WORDS, LENGTH = 4, 5, 4
SFT_STEPS, SFT_RATE = 600, 2e-2

Parameters = dict[str, Tensor]
"""Parameters by name, [R, ., .]."""


def all_outputs(words: int, length: int) -> Tensor:
    """All outputs of `length` words out of `words`, [S, T]."""
    return torch.tensor(list(itertools.product(range(words), repeat=length)))


def random_gru(worlds: int, hidden: int, *, seed: int, dtype: torch.dtype = torch.float64) -> Parameters:
    """R random GRUs of `hidden` units."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(worlds, *shape, generator=generator, dtype=dtype)

    def uniform(*shape: int) -> Tensor:
        return (2 * torch.rand(worlds, *shape, generator=generator, dtype=dtype) - 1) / math.sqrt(hidden)

    return {
        "prompt": normal(PROMPTS, hidden),
        "word": normal(WORDS, hidden),
        "input": uniform(hidden, 3 * hidden),
        "input_bias": uniform(1, 3 * hidden),
        "state": uniform(hidden, 3 * hidden),
        "state_bias": uniform(1, 3 * hidden),
        "output": uniform(hidden, WORDS),
        "output_bias": uniform(1, WORDS),
    }


def gru_log_probs(gru: Parameters) -> Tensor:
    """log pi(y|x) of all outputs, [R, P, S], in the order of `all_outputs`."""
    state = gru["prompt"].tanh()
    worlds, _, hidden = state.shape
    inputs = torch.baddbmm(gru["input_bias"], gru["word"], gru["input"])[:, None]
    found = state.new_zeros(worlds, PROMPTS, 1)
    for place in range(LENGTH):
        step = torch.baddbmm(gru["output_bias"], state, gru["output"]).log_softmax(dim=-1)
        found = (found.reshape(worlds, -1, 1) + step).reshape(worlds, PROMPTS, -1)
        if place < LENGTH - 1:
            before = torch.baddbmm(gru["state_bias"], state, gru["state"])[:, :, None]
            reset = (inputs[..., :hidden] + before[..., :hidden]).sigmoid()
            keep = (inputs[..., hidden : 2 * hidden] + before[..., hidden : 2 * hidden]).sigmoid()
            new = (inputs[..., 2 * hidden :] + reset * before[..., 2 * hidden :]).tanh()
            state = ((1 - keep) * new + keep * state[:, :, None]).reshape(worlds, -1, hidden)
    return found


@dataclass(frozen=True)
class World:
    """Rewards [R, P, S], and log-probs [R, P, S] of data that pi_sft is fitted to."""

    rewards: Tensor
    data: Tensor


def fit(gru: Parameters, data: Tensor) -> Parameters:
    """Fit to the data by their whole distribution, log-probs [R, P, S]: supervised fine-tuning without noise."""
    probabilities = data.exp()
    return minimise(
        gru,
        gru_log_probs,
        lambda found: -(probabilities * found).sum(dim=-1).mean(dim=-1),
        rate=SFT_RATE,
        steps=SFT_STEPS,
    )


def random_worlds(seeds: range, *, dtype: torch.dtype = torch.float64) -> World:
    """Rewards with interactions of one, two and three words; data with interactions of neighbours."""
    return World(*(torch.stack(each).to(dtype) for each in zip(*map(_random_world, seeds), strict=True)))


def _random_world(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = all_outputs(WORDS, LENGTH)

    def table(*places: int) -> Tensor:
        values = torch.randn(PROMPTS, *[WORDS] * len(places), generator=generator, dtype=torch.float64)
        flat = torch.stack([words[:, place] * WORDS**power for power, place in enumerate(reversed(places))]).sum(dim=0)
        return values.flatten(1)[:, flat]

    rewards = torch.stack([0.5 * table(place) for place in range(LENGTH)]).sum(dim=0)
    for first, second in itertools.combinations(range(LENGTH), 2):
        rewards = rewards + 0.7 * table(first, second)
    rewards = rewards + 0.7 * table(0, 1, 3)
    data = 0.5 * torch.randn(rewards.shape, generator=generator, dtype=torch.float64)
    for place in range(LENGTH - 1):
        data = data + 1.2 * table(place, place + 1)
    return rewards, data.log_softmax(dim=-1)


def standardise(rewards: Tensor, reference: Tensor, *, deviation: float) -> Tensor:
    """Rewards with mean 0 at every prompt and this standard deviation in every world, under pi_sft [R, P, S]."""
    probabilities = reference.exp()
    centred = rewards - (probabilities * rewards).sum(dim=-1, keepdim=True)
    variance = (probabilities * centred.square()).sum(dim=-1).mean(dim=-1)
    return deviation * centred / variance.sqrt()[:, None, None]


def optimum(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log pi*_beta = log pi_sft + r / beta, normalised, [R, P, S]."""
    return (reference + rewards / beta).log_softmax(dim=-1)


def expected_reward(policy: Tensor, rewards: Tensor) -> Tensor:
    """E[r], the mean over prompts, [R]."""
    return (policy.exp() * rewards).sum(dim=-1).mean(dim=-1)


def kl(policy: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference), the mean over prompts, [R]."""
    return (policy.exp() * (policy - reference)).sum(dim=-1).mean(dim=-1)


def minimise(
    parameters: Parameters,
    log_probs: Callable[[Parameters], Tensor],
    loss: Callable[[Tensor], Tensor],
    *,
    rate: float,
    steps: int,
    observe: Callable[[int, Tensor], None] = lambda step, found: None,
    decay: bool = True,
) -> Parameters:
    """Adam on losses [R] of log-probs [R, P, S], with a gradient norm of at most 1 for each world.

    rate: learning rate, which falls linearly to 0 if `decay`. `observe` gets log-probs before every step, and at
    the end.
    """
    now = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    optimizer = torch.optim.Adam(now.values(), rate, betas=(0.9, 0.95))
    for step in range(steps + 1):
        found = log_probs(now)
        observe(step, found.detach())
        if step == steps:
            break
        optimizer.zero_grad()
        loss(found).sum().backward()
        gradients = [value.grad for value in now.values() if value.grad is not None]
        norm = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        for gradient in gradients:
            gradient *= (1 / (norm + 1e-6)).clamp(max=1.0)[:, None, None]
        if decay:
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
    return {name: value.detach() for name, value in now.items()}
