"""The runs of the comparison: what they are, and how they are trained with the package's losses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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


P = TypeVar("P", bound=Policy)


class World(Protocol[P]):
    """A reference policy with its drawn groups."""

    @property
    def groups(self) -> Groups:
        """The groups to train on."""

    def policy(self, run: Run) -> P:
        """A policy equal to the reference."""

    def logps(self, policies: Sequence[P], chosen: Tensor, K: int) -> Tensor:
        """log pi_theta of the first K candidates of the groups `chosen` [G] under R policies, as [R, G, K] fp64."""

    def evaluate(self, policy: P) -> PromptMeans:
        """Reward and exact KL of its samples at the test prompts: the same prompts and draws for every policy."""


def alike(run: Run) -> Run:
    """What a run has in common with those that see the same candidates in the same order."""
    return replace(run, method="", beta_pi=0.0, beta_r=0.0, lr=0.0)


def train(world: World[P], runs: Sequence[Run]) -> list[P]:
    """Train a policy for each of the runs, which are alike, with the package's losses.

    They see the same groups at the same step, so that what depends on pi_sft alone is computed once for all. Each
    has Adam of its own, and gradients clipped at norm 1.
    """
    (common,) = {alike(run) for run in runs}
    policies, groups = [world.policy(run) for run in runs], world.groups
    trained = [(policy.trained(), run.lr) for policy, run in zip(policies, runs, strict=True)]
    optimizer = torch.optim.Adam([{"params": own, "lr": lr} for own, lr in trained], betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(common.steps, 1))
    generator = torch.Generator().manual_seed(common.seed)
    for _ in range(common.steps):
        chosen = torch.randint(len(groups.rewards), (common.groups,), generator=generator)
        rewards, reference_logps = groups.rewards[chosen, : common.K], groups.reference_logps[chosen, : common.K]
        log_ratios = world.logps(policies, chosen, common.K) - reference_logps
        losses = [_loss(run, log_ratio, rewards) for run, log_ratio in zip(runs, log_ratios, strict=True)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        for own, _ in trained:
            torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        schedule.step()
    return policies


def _loss(run: Run, log_ratio: Tensor, rewards: Tensor) -> Tensor:
    """Mean loss of groups [G, K]."""
    log_p_theta, log_p_r = policy_log_probs(log_ratio, run.beta_pi), reward_log_target(rewards, run.beta_r)
    return LOSSES[run.method](log_p_theta, log_p_r).mean()


def finish_runs(world: World[Any], runs: Sequence[Run]) -> list[PromptMeans]:
    """Train runs that are alike, and evaluate each."""
    policies = train(world, runs)
    with torch.no_grad():
        return [world.evaluate(policy) for policy in policies]


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
    file.parent.mkdir(exist_ok=True)
    with atomic_open(file, "wb") as opened:
        np.savez(opened, rewards=means.rewards, kls=means.kls)


def read_means(file: Path) -> PromptMeans:
    """Read what `write_means` wrote."""
    with np.load(file) as stored:
        return PromptMeans(stored["rewards"], stored["kls"])
