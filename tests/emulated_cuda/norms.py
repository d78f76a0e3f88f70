"""RMSNorm as CUDA has it: one operator forward and one backward, which elsewhere are composites."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def forward(
    hidden: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """x s w in the dtype of `hidden`, and s = (mean(x^2) + eps)^(-1/2) [..., 1], at least fp32."""
    dims = _dims(normalized_shape)
    x = _wide(hidden)
    scale = (x.square().mean(dims, keepdim=True) + (torch.finfo(hidden.dtype).eps if eps is None else eps)).rsqrt()
    normed = x * scale if weight is None else x * scale * _wide(weight)
    return normed.to(hidden.dtype).to(hidden.device), scale.to(hidden.device)


def backward(
    grad: Tensor,
    hidden: Tensor,
    normalized_shape: Sequence[int],
    scale: Tensor,
    weight: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """s g w - s^3 mean(g w x) x, and the sum of g x s over everything that is not normalised."""
    dims = _dims(normalized_shape)
    x, g, s = _wide(hidden), _wide(grad), _wide(scale)
    weighted = g if weight is None else g * _wide(weight)
    of_hidden = s * weighted - s.pow(3) * (weighted * x).mean(dims, keepdim=True) * x
    results: list[Tensor | None] = [of_hidden.to(hidden.dtype).to(hidden.device), None]
    if weight is not None:
        of_weight = (g * x * s).reshape(-1, *normalized_shape).sum(0)
        results[1] = of_weight.to(weight.dtype).to(weight.device)
    wanted = (each if mask else None for each, mask in zip(results, output_mask, strict=True))
    first, second = wanted
    return first, second


def _dims(normalized_shape: Sequence[int]) -> list[int]:
    return list(range(-len(normalized_shape), 0))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().to(torch.promote_types(tensor.dtype, torch.float32))
