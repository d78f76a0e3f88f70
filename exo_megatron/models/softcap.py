"""Gemma 2's bound on attention scores and logits."""

from __future__ import annotations

from torch import Tensor


def soft_cap_(values: Tensor, cap: float | None) -> Tensor:
    """values, in place, become cap * tanh(values / cap), of the same shape and dtype; None leaves them as they are."""
    return values if cap is None else values.div_(cap).tanh_().mul_(cap)


def soft_cap_slope(capped: Tensor, cap: float) -> Tensor:
    """Derivative of the soft cap at each place, from what it returned."""
    return 1 - (capped / cap).square_()
