"""Training steps of another library's loss on an HF model: clipping and torch's AdamW, with our
settings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from exo_megatron.data.groups import Group
from exo_megatron.diagnosis.timing import Clock, timed
from tools.bench.training import ADAM, LEARNING_RATE


@dataclass(frozen=True)
class Batching:
    """A setting of a peer: how much goes into a forward pass, and whether texts of like length go
    together.
    """

    size: int
    by_length: bool = False

    def shown(self, unit: str) -> str:
        """Describe the setting, in units of the peer."""
        return f"{self.size} {unit}{'s' if self.size > 1 else ''} a batch{', by length' if self.by_length else ''}"


class Peer(Protocol):
    """A model and its loss.

    Groups without reference log-probs get them from its live reference, in `backward`.
    """

    @property
    def name(self) -> str:
        """Name of the peer, for tables."""
        ...

    @property
    def unit(self) -> str:
        """What the size of a batch counts."""
        ...

    @property
    def settings(self) -> tuple[Batching, ...]:
        """The settings of which the fastest is taken."""
        ...

    @property
    def model(self) -> torch.nn.Module:
        """The model under training."""
        ...

    def units(self, groups: Sequence[Group]) -> int:
        """Count the units that the groups have."""
        ...

    def backward(self, groups: Sequence[Group], batching: Batching) -> None:
        """Add the gradient of the mean loss over the groups to the model's."""
        ...

    def batches(self, groups: Sequence[Group], batching: Batching) -> list[list[int]]:
        """List the lengths of the sequences of each forward pass."""
        ...


@dataclass(frozen=True)
class PeerSteps:
    """Counterpart of `OurSteps` for a peer at one of its settings."""

    peer: Peer
    batching: Batching
    optimizer: torch.optim.Optimizer

    @classmethod
    def at_best(cls, peer: Peer, groups: Sequence[Group], clock: Clock) -> PeerSteps:
        """Take the setting whose forward and backward is fastest on these groups.

        Settings that do not divide the groups evenly are left out: a step would end with a smaller
        batch. Each setting is timed three times, the settings in turn, and its best time counts.
        """
        possible = [each for each in peer.settings if peer.units(groups) % each.size == 0]
        seconds = dict.fromkeys(possible, math.inf)
        for batching in possible * 3:
            seconds[batching] = min(seconds[batching], timed(partial(peer.backward, groups, batching), clock))
        best = min(possible, key=seconds.__getitem__)
        betas = ADAM.beta1, ADAM.beta2
        optimizer = torch.optim.AdamW(peer.model.parameters(), lr=LEARNING_RATE, betas=betas, weight_decay=0.0)
        optimizer.zero_grad()
        return cls(peer, best, optimizer)

    @property
    def shown(self) -> str:
        """Name the peer and its setting."""
        return f"{self.peer.name}, {self.batching.shown(self.peer.unit)}"

    def gradients(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Compute the gradient of the mean loss over the groups, by HF's names."""
        self.peer.backward(groups, self.batching)
        found = {name: p.grad.clone() for name, p in self.peer.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad()
        return found

    def step(self, groups: Sequence[Group]) -> None:
        """Run one optimizer step."""
        self.peer.backward(groups, self.batching)
        torch.nn.utils.clip_grad_norm_(self.peer.model.parameters(), ADAM.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
