"""One run of the comparison: what it is, and how it is trained with the package's losses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from exo_megatron import dpo_loss, exo_loss, policy_log_probs, reward_log_target
from exo_megatron.evaluation.estimates import PromptMeans
from exo_megatron.losses import paper
from exo_megatron.utils.files import atomic_open

LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"exo_rw": exo_loss, "dpo_rw": dpo_loss}
METHODS = tuple(LOSSES)


@dataclass(frozen=True)
class Run:
    """One training run, in the paper's symbols.

    Attributes:
        policy: "bigram" or "transformer-bias".
        rank: rank of what a bigram policy can change per state, None for others.
        K: candidates of a group, the first K of those drawn.
        lr: largest learning rate; it falls linearly to 0.
        steps, groups: optimizer steps, and groups (prompts) of each.
        seed: of candidates, initial weights and order.
    """

    policy: str
    rank: int | None
    K: int
    method: str
    beta_pi: float
    beta_r: float
    lr: float
    steps: int
    groups: int
    seed: int


@dataclass(frozen=True)
class Groups:
    """N prompts with all their candidates: rewards and log pi_sft, both [N, K] fp64."""

    rewards: Tensor
    reference_logps: Tensor


class Policy(Protocol):
    """What is trained."""

    def trained(self) -> list[torch.nn.Parameter]:
        """What the optimizer changes."""

    def logps(self, chosen: Tensor, K: int) -> Tensor:
        """log pi_theta of the first K candidates of the groups `chosen` [G], as [G, K] fp64."""


P = TypeVar("P", bound=Policy)


class World(Protocol[P]):
    """A reference policy with its drawn groups."""

    @property
    def groups(self) -> Groups:
        """The groups to train on."""

    def policy(self, run: Run) -> P:
        """A policy equal to the reference."""

    def evaluate(self, policy: P) -> PromptMeans:
        """Reward and exact KL of its samples at the test prompts: the same prompts and draws for every policy."""


def train(world: World[P], run: Run) -> P:
    """Train a policy with the package's losses, Adam, and gradients clipped at norm 1."""
    policy, groups = world.policy(run), world.groups
    parameters = policy.trained()
    optimizer = torch.optim.Adam(parameters, run.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(run.steps, 1))
    generator = torch.Generator().manual_seed(run.seed)
    for _ in range(run.steps):
        chosen = torch.randint(len(groups.rewards), (run.groups,), generator=generator)
        log_ratio = policy.logps(chosen, run.K) - groups.reference_logps[chosen, : run.K]
        log_p_r = reward_log_target(groups.rewards[chosen, : run.K], run.beta_r)
        losses = LOSSES[run.method](policy_log_probs(log_ratio, run.beta_pi), log_p_r)
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return policy


def finish_run(world: World[Any], run: Run) -> PromptMeans:
    """Train and evaluate."""
    policy = train(world, run)
    with torch.no_grad():
        return world.evaluate(policy)


@cache
def code_digest() -> str:
    """Identifies the code that the result of a run depends on."""
    own = (Path(__file__).with_name(f"{name}.py") for name in ("reviews", "sweep", "bigram", "transformer"))
    files = (*own, Path(paper.__file__))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:20]


def run_key(run: Run) -> str:
    """A name for the result of a run by this code."""
    return hashlib.sha256(json.dumps([asdict(run), code_digest()]).encode()).hexdigest()[:20]


def write_means(file: Path, means: PromptMeans) -> None:
    """Write the result of a run."""
    with atomic_open(file, "wb") as opened:
        np.savez(opened, rewards=means.rewards, kls=means.kls)


def read_means(file: Path) -> PromptMeans:
    """Read what `write_means` wrote."""
    with np.load(file) as stored:
        return PromptMeans(stored["rewards"], stored["kls"])
