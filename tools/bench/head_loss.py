"""Head and loss of one group: ours on its packed sequence against the straightforward way on
separate sequences.

Straightforward, as in the authors' released code: logits of every position of K sequences `[prompt
| y_k]`, divided by tau, a log-softmax of all of them, selection of the targets, sums over candidate
tokens, then the loss. Ours projects the 1 + K (R - 1) positions that predict a candidate token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from exo_megatron.config.sections import LossConfig
from exo_megatron.diagnosis.memory import peak_bytes
from exo_megatron.diagnosis.timing import alternate
from exo_megatron.logprobs.softmax import VocabShard, plan_tiles
from exo_megatron.logprobs.vocab_parallel import sequence_logprobs, sharded_logprobs
from exo_megatron.losses.objective import group_objective
from exo_megatron.models.layouts.groups import GroupLayout, build_layout
from tools.bench.measured import Measured
from tools.bench.sides import agree

STRAIGHT, KEPT, PARTLY, RECOMPUTED = "straightforward", "ours, kept", "ours, partly kept", "ours, recomputed"
MEMORY_MIB = {KEPT: 1024.0, PARTLY: 17.0, RECOMPUTED: 1.0}
"""Values of compute.logits_memory_mib of our sides."""
TOLERANCE, STRAIGHT_TOLERANCE = 1e-5, 1e-4
"""Tolerances of ours and of the straightforward way against float64.

The latter's fp32 logits of the size of 12 lose more digits: 2e-5.
"""
LOSS = LossConfig()


@dataclass(frozen=True)
class Size:
    """Sizes P, R, K, H and V."""

    prompt: int
    length: int
    candidates: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"P={self.prompt}, R={self.length}, K={self.candidates}, V={self.vocab}, H={self.hidden}"


class HeadAndLoss:
    """One group, with hidden states on both layouts.

    The gradient of the weight goes to a buffer or to a new tensor.
    """

    def __init__(self, size: Size, device: torch.device, *, buffer: bool) -> None:
        """Draw inputs. buffer: there is a gradient buffer beforehand, as in training under
        megatron-core.
        """
        generator = torch.Generator().manual_seed(0)

        def ids(count: int) -> list[int]:
            return torch.randint(size.vocab, (count,), generator=generator).tolist()

        prompt, candidates = ids(size.prompt), [ids(size.length) for _ in range(size.candidates)]
        self.layout: GroupLayout = build_layout([prompt], [candidates]).to(device)
        hidden = torch.randn(self.layout.num_tokens, size.hidden, generator=generator).to(device)
        self.size = size
        self.copies = self._places_of_copies(device)
        self.packed = hidden[self.layout.predict_index].requires_grad_()
        self.separate = hidden[self.copies].requires_grad_()
        self.ids = torch.tensor([prompt + candidate for candidate in candidates], device=device)
        weight = torch.randn(size.vocab, size.hidden, generator=generator) * (3 / size.hidden**0.5)
        self.weight = torch.nn.Parameter(weight.to(device))
        self.buffer = torch.zeros_like(self.weight) if buffer else None
        # Log-ratios of a policy that has moved, or p_theta would be one-hot and the gradient 0.
        drift = torch.randn(size.candidates, generator=generator, dtype=torch.float64)
        self.rewards = 0.1 * torch.randn(size.candidates, generator=generator, dtype=torch.float64).to(device)
        with torch.no_grad():
            self.reference = self._packed_logps(MEMORY_MIB[KEPT]) - drift.to(device)

    def _places_of_copies(self, device: torch.device) -> Tensor:
        """Return the place in the packed sequence of each position of the separate sequences, [K, P +
        R].
        """
        prompt = torch.arange(self.size.prompt, device=device).expand(self.size.candidates, -1)
        candidates = torch.arange(self.size.candidates * self.size.length, device=device)
        return torch.cat((prompt, self.size.prompt + candidates.view(self.size.candidates, -1)), dim=1)

    def _packed_logps(self, memory_mib: float) -> Tensor:
        tiling = plan_tiles(self.packed.shape[0], self.size.vocab, self.weight, memory_mib=memory_mib)
        tokens = sharded_logprobs(
            self.packed,
            self.weight,
            self.layout.token_predictor,
            self.layout.token_target,
            VocabShard(None, 0, 1, self.size.vocab),
            temperature=LOSS.temperature,
            tiling=tiling,
        )
        return sequence_logprobs(tokens, self.layout)

    def ours(self, memory_mib: float) -> Tensor:
        """Compute the loss as training does."""
        logps = self._packed_logps(memory_mib)
        return group_objective(logps, self.reference, self.rewards, self.layout.group_sizes, LOSS).losses.sum()

    def straightforward(self) -> Tensor:
        """Compute the loss from the formulas (Eq. 15 of the paper).

        Sums are in fp64: in fp32 their rounding alone is 2e-5.
        """
        logps = torch.log_softmax((self.separate @ self.weight.t()) / LOSS.temperature, dim=-1)
        tokens = logps[:, :-1].gather(-1, self.ids[:, 1:, None])[..., 0]
        of_candidates = torch.arange(1, self.ids.shape[1], device=self.ids.device) >= self.size.prompt
        return self._loss((tokens.double() * of_candidates).sum(-1))

    def _loss(self, logps: Tensor) -> Tensor:
        log_p = torch.log_softmax(LOSS.beta_pi * (logps - self.reference), dim=-1)
        return (log_p.exp() * (log_p - torch.log_softmax(self.rewards / LOSS.beta_r, dim=-1))).sum()

    def exact(self) -> dict[str, Tensor]:
        """Compute gradients by float64 autograd of the formulas, on the positions that predict a
        candidate token.
        """
        hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (self.packed, self.weight))
        layout = self.layout
        logps = torch.log_softmax(hidden @ weight.t() / LOSS.temperature, dim=-1)
        tokens = logps[layout.token_predictor, layout.token_target]
        sums = torch.zeros_like(self.reference).index_add(0, layout.token_candidate, tokens)
        d_hidden, d_weight = torch.autograd.grad(self._loss(sums), (hidden, weight))
        return {"hidden": d_hidden, "weight": d_weight}

    def step(self, loss: Callable[[], Tensor]) -> None:
        """Run forward and backward, then megatron-core's hook, which adds `grad` to the buffer
        unless that has been done.
        """
        attributes = vars(self.weight)
        if self.buffer is not None:
            attributes |= {"main_grad": self.buffer, "grad_added_to_main_grad": False}
        loss().backward()
        if self.buffer is not None:
            if self.weight.grad is not None and not attributes["grad_added_to_main_grad"]:
                self.buffer.add_(self.weight.grad)
            self.weight.grad = None

    def forget(self) -> None:
        """Clear the gradients of the last step."""
        self.packed.grad = self.separate.grad = self.weight.grad = None

    def work(self, loss: Callable[[], Tensor]) -> None:
        """Run one step, after clearing gradients."""
        self.forget()
        self.step(loss)

    def gradients(self, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Compute the gradients of the weight, and of the hidden states that predict a candidate
        token.

        That of the prompt's last token is the sum over its copies.
        """
        if self.buffer is not None:
            self.buffer.zero_()
        self.work(loss)
        gradient = self.packed.grad
        if self.separate.grad is not None:
            packed = torch.zeros(self.layout.num_tokens, self.size.hidden, device=self.weight.device)
            packed.index_add_(0, self.copies.flatten(), self.separate.grad.flatten(0, 1))
            gradient = packed[self.layout.predict_index]
        weight = self.weight.grad if self.buffer is None else self.buffer
        assert gradient is not None and weight is not None
        return {"hidden": gradient.clone(), "weight": weight.clone()}


def compare(size: Size, device: torch.device, rounds: int, *, buffer: bool) -> Measured:
    """Compare and measure all sides. Raises Different if the gradients of one differ."""
    sides = HeadAndLoss(size, device, buffer=buffer)
    losses: dict[str, Callable[[], Tensor]] = {
        STRAIGHT: sides.straightforward,
        **{name: partial(sides.ours, memory_mib) for name, memory_mib in MEMORY_MIB.items()},
    }
    wanted = sides.exact()
    differences = {
        name: agree(sides.gradients(loss), wanted, tolerance=STRAIGHT_TOLERANCE if name == STRAIGHT else TOLERANCE)
        for name, loss in losses.items()
    }
    del wanted
    peaks = {}
    for name, loss in losses.items():
        sides.forget()  # else what is freed of the last side would count for this one
        peaks[name] = peak_bytes(partial(sides.step, loss))
    work = {name: partial(sides.work, loss) for name, loss in losses.items()}
    return Measured(alternate(work, rounds=rounds), peaks, differences)
