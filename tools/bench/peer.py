"""Training steps of another library's loss on an HF model: clipping and torch's AdamW, with our
settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from exo_megatron.data.groups import Group
from tools.bench.training import ADAM, LEARNING_RATE


class Peer(Protocol):
    """A model and its loss.

    Groups without reference log-probs get them from its live reference, in `backward`.
    """

    @property
    def model(self) -> torch.nn.Module:
        """The model under training."""
        ...

    def backward(self, groups: Sequence[Group]) -> None:
        """Add the gradient of the mean loss over the groups to the model's."""
        ...


class PeerSteps:
    """Counterpart of `OurSteps` for a peer."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        betas = ADAM.beta1, ADAM.beta2
        self.optimizer = torch.optim.AdamW(peer.model.parameters(), lr=LEARNING_RATE, betas=betas, weight_decay=0.0)

    def gradients(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Compute the gradient of the mean loss over the groups, by HF's names."""
        self.peer.backward(groups)
        found = {name: p.grad.clone() for name, p in self.peer.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad()
        return found

    def step(self, groups: Sequence[Group]) -> None:
        """Run one optimizer step."""
        self.peer.backward(groups)
        torch.nn.utils.clip_grad_norm_(self.peer.model.parameters(), ADAM.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
