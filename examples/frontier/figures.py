"""Figures 1 and 3 of the paper on enumerated policies that cannot represent pi*, with the package's losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exo_megatron import policy_log_probs, reward_log_target
from frontier.enumerated import (
    Parameters,
    all_outputs,
    expected_reward,
    fit,
    gru_log_probs,
    kl,
    minimise,
    optimum,
    random_gru,
    random_worlds,
    standardise,
)
from frontier.sweep import LOSSES

GROUPS = 64
"""Groups of one step, in each world."""

CANDIDATES = (8, 32)
POINTS = 25
"""Places of a run where it is measured."""

OPTIMUM = "optimum"
BETAS = np.geomspace(40, 0.1, 80)
"""Of the optima pi*_beta that a figure compares with."""


@dataclass(frozen=True)
class Settings:
    """How the policies of a figure are trained."""

    beta_pi: float
    beta_r: float
    rate: float
    steps: int


TAIL = Settings(beta_pi=0.5, beta_r=1.0, rate=6e-3, steps=250)
MODES = Settings(beta_pi=0.5, beta_r=0.25, rate=3e-2, steps=200)


@dataclass(frozen=True)
class Path:
    """What runs pass through: values [points, worlds] by name, "kl" among them."""

    values: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, measured: Iterable[Mapping[str, Tensor]]) -> Path:
        """Join the points of a path, values [worlds]."""
        points = list(measured)
        return cls({name: torch.stack([point[name] for point in points]).numpy() for name in points[0]})

    def at_kl(self, name: str, level: float) -> np.ndarray:
        """The value of each world where its run first reaches this KL, interpolated; NaN where it never does."""
        found = np.full(self.values["kl"].shape[1], np.nan)
        for world, (kls, values) in enumerate(zip(self.values["kl"].T, self.values[name].T, strict=True)):
            reached = np.flatnonzero(kls >= level)
            if len(reached) and reached[0] > 0:
                place = slice(reached[0] - 1, reached[0] + 1)
                found[world] = np.interp(level, kls[place], values[place])
        return found


Paths = dict[tuple[str, int | None], Path]
"""By method and K; (OPTIMUM, None) goes over BETAS."""

Measure = Callable[[Tensor], dict[str, Tensor]]


def tail_paths(worlds: int, settings: Settings = TAIL) -> Paths:
    """Figure 3: the mass "fifth 0" to "fifth 4" on outputs by their likelihood under pi_sft.

    pi_sft and the policies are GRUs of three units, which cannot represent pi*.
    """
    world = random_worlds(range(worlds), dtype=torch.float32)
    fitted = fit(random_gru(worlds, 3, seed=0, dtype=torch.float32), world.data)
    reference = gru_log_probs(fitted)
    rewards = standardise(world.rewards, reference, deviation=3.0)
    fifths = likelihood_fifths(reference)
    masses = {f"fifth {number}": fifths == number for number in range(5)}
    return train_all(fitted, gru_log_probs, reference, rewards, masses, settings)


def likelihood_fifths(reference: Tensor) -> Tensor:
    """The fifth of pi_sft's mass that each output is in, [R, P, S]: 0 for the least likely outputs, 4 for the most."""
    order = reference.argsort(dim=-1)
    mass = reference.exp().gather(-1, order).cumsum(dim=-1)
    return torch.zeros_like(order).scatter(-1, order, (mass * 5).long().clamp(max=4))


def mode_paths(worlds: int, settings: Settings = MODES) -> Paths:
    """Figure 1: the mass "better mode", "other mode" and "between" of policies that cannot hold two modes.

    A policy draws five words out of three independently. The reward grows towards two modes that differ in four words
    or five, one of them a little better. An output belongs to a mode if at most one word differs.
    """
    words = all_outputs(3, 5)
    generator = torch.Generator().manual_seed(3)
    modes = torch.stack([_two_modes(generator) for _ in range(worlds)])
    matches = (words == modes[:, :, None]).sum(dim=-1).float()  # [R, 2, S]
    logits = 0.5 * torch.randn(worlds, words.shape[1], 3, generator=generator)
    reference = independent_log_probs({"logits": logits})
    rewards = torch.maximum(matches[:, 0] + 0.25, matches[:, 1])[:, None]
    near = (matches >= words.shape[1] - 1)[:, :, None]
    masses = {"better mode": near[:, 0], "other mode": near[:, 1], "between": ~(near[:, 0] | near[:, 1])}
    return train_all({"logits": logits}, independent_log_probs, reference, rewards, masses, settings)


def _two_modes(generator: torch.Generator) -> Tensor:
    while True:
        modes = torch.randint(3, (2, 5), generator=generator)
        if (modes[0] != modes[1]).sum() >= 4:
            return modes


def independent_log_probs(parameters: Parameters) -> Tensor:
    """Log-probs [R, 1, S] of words that are drawn independently, from logits [R, T, V]."""
    by_place = parameters["logits"].log_softmax(dim=-1)
    words = all_outputs(by_place.shape[2], by_place.shape[1])
    places = torch.arange(words.shape[1])
    return by_place[:, places, words].sum(dim=-1)[:, None]


def train_all(
    start: Parameters,
    log_probs: Callable[[Parameters], Tensor],
    reference: Tensor,
    rewards: Tensor,
    masses: Mapping[str, Tensor],
    settings: Settings,
) -> Paths:
    """Train with every loss and K from `start`; the optima pi*_beta come first.

    masses: name -> outputs [R, P, S] whose probability is measured, besides "kl" and "reward".
    """

    def measure(found: Tensor) -> dict[str, Tensor]:
        mass = {name: (found.exp() * inside).sum(dim=-1).mean(dim=-1) for name, inside in masses.items()}
        return {"kl": kl(found, reference), "reward": expected_reward(found, rewards), **mass}

    paths: Paths = {(OPTIMUM, None): Path.of(measure(optimum(reference, rewards, float(beta))) for beta in BETAS)}
    for method in LOSSES:
        for K in CANDIDATES:
            seen: list[dict[str, Tensor]] = []
            minimise(
                start,
                log_probs,
                sampled_loss(method, K, reference, rewards, settings),
                rate=settings.rate,
                steps=settings.steps,
                observe=_observer(seen, measure, settings.steps // POINTS),
                decay=False,
            )
            paths[method, K] = Path.of(seen)
    return paths


def _observer(seen: list[dict[str, Tensor]], measure: Measure, interval: int) -> Callable[[int, Tensor], None]:
    def observe(step: int, found: Tensor) -> None:
        if step % interval == 0:
            seen.append(measure(found))

    return observe


def sampled_loss(
    method: str, K: int, reference: Tensor, rewards: Tensor, settings: Settings
) -> Callable[[Tensor], Tensor]:
    """Make a function from log-probs [R, P, S] to losses [R] of GROUPS groups, drawn anew from pi_sft at each call."""
    generator = torch.Generator().manual_seed(17)
    worlds, prompts, outputs = reference.shape

    def loss(found: Tensor) -> Tensor:
        chosen = torch.randint(prompts, (worlds, GROUPS), generator=generator)
        chances = reference.exp().gather(1, chosen[..., None].expand(-1, -1, outputs)).reshape(-1, outputs)
        drawn = torch.multinomial(chances, K, replacement=True, generator=generator).view(worlds, GROUPS, K)
        index = (chosen[..., None] * outputs + drawn).flatten(1)
        policy, sft, reward = (
            values.flatten(1).gather(1, index).view(worlds, GROUPS, K).double()
            for values in (found, reference, rewards)
        )
        log_p_theta = policy_log_probs(policy - sft, settings.beta_pi)
        return LOSSES[method](log_p_theta, reward_log_target(reward, settings.beta_r)).mean(dim=-1)

    return loss
