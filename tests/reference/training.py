"""Steps of AdamW on an HF model with the paper's objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.reference.objective import ReferenceGroup

BatchLoss = Callable[[LlamaForCausalLM, Sequence[ReferenceGroup]], Tensor]
"""The scalar that a step descends on, from the model and the groups of its global batch."""


@dataclass(frozen=True)
class Adam:
    """Optimizer settings. `learning_rates` holds one value per step. Norm weights and biases are not decayed."""

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
    """Learning rate of each step: `warmup` equal rises to `lr`, then falling on the straight line from lr at the first
    step after them to min_ratio * lr at the step that would follow the last one.
    """
    rises = [lr * step / warmup for step in range(1, warmup + 1)]
    count = steps - warmup
    falls = [lr * (min_ratio + (1.0 - min_ratio) * (count - step) / count) for step in range(count)]
    return tuple((rises + falls)[:steps])


def train(
    policy: LlamaForCausalLM, batches: Sequence[Sequence[ReferenceGroup]], batch_loss: BatchLoss, adam: Adam
) -> list[StepResult]:
    """One optimizer step per batch; changes `policy` in place."""
    matrices = [p for p in policy.parameters() if p.ndim > 1]
    vectors = [p for p in policy.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": adam.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
    )
    results = []
    for learning_rate, groups in zip(adam.learning_rates, batches, strict=True):
        optimizer.zero_grad()
        loss = batch_loss(policy, groups)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
        largest = adam.clip_grad if adam.clip_grad > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), largest)
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate
        optimizer.step()
        results.append(StepResult(loss.item(), gradients, norm.item()))
    return results
