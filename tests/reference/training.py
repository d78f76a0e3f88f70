"""Steps of AdamW on an HF model with the paper's objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.reference.objective import Objective, ReferenceGroup, batch_losses


@dataclass(frozen=True)
class Adam:
    """Optimizer settings. `learning_rates` holds one value per step."""

    learning_rates: tuple[float, ...]
    beta1: float
    beta2: float
    eps: float
    clip_grad: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class StepResult:
    """Loss (mean over the groups), gradients before clipping by HF parameter name, and their global norm."""

    loss: float
    gradients: dict[str, Tensor]
    grad_norm: float


def warmup_linear_rates(lr: float, *, steps: int, warmup: int, min_ratio: float) -> tuple[float, ...]:
    """Learning rate of each step: rising to `lr` in `warmup` steps, then linearly to min_ratio * lr at the last one."""
    rates = []
    for step in range(1, steps + 1):
        if step <= warmup:
            rates.append(lr * step / warmup)
        else:
            rates.append(lr * (1.0 - (1.0 - min_ratio) * (step - warmup) / (steps - warmup)))
    return tuple(rates)


def train(
    policy: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    batches: Sequence[Sequence[ReferenceGroup]],
    objective: Objective,
    adam: Adam,
) -> list[StepResult]:
    """One optimizer step per batch; changes `policy` in place."""
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        lr=adam.learning_rates[0],
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        weight_decay=adam.weight_decay,
    )
    results = []
    for learning_rate, groups in zip(adam.learning_rates, batches, strict=True):
        optimizer.zero_grad()
        loss = batch_losses(policy, reference, groups, objective).mean()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
        largest = adam.clip_grad if adam.clip_grad > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), largest)
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.step()
        results.append(StepResult(loss.item(), gradients, norm.item()))
    return results
