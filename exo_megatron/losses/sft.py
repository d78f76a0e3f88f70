"""Supervised fine-tuning: the negative log-likelihood of the demonstrations."""

from __future__ import annotations

from torch import Tensor


def sft_loss_sum(token_logps: Tensor) -> Tensor:
    """- sum of the per-token log-probs [N], in nats; the step divides by the global number of tokens."""
    return -token_logps.double().sum()
