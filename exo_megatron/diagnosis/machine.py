"""What this device reaches by itself: matrix products and copies, timed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from exo_megatron.diagnosis.timing import timed


@dataclass(frozen=True)
class SquareProducts:
    """Products of two square matrices, `times` of them, into a third."""

    matrices: tuple[Tensor, Tensor, Tensor]
    times: int

    @classmethod
    def of(cls, size: int, dtype: torch.dtype, device: torch.device, *, seconds: float) -> SquareProducts:
        """Make as many products as take about so many seconds."""
        left, right, result = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(3))
        one = cls((left, right, result), 1)
        one()
        return cls((left, right, result), math.ceil(seconds / timed(one)))

    @property
    def flops(self) -> float:
        """FLOPs of all products."""
        return 2.0 * self.matrices[0].shape[0] ** 3 * self.times

    def __call__(self) -> None:
        left, right, result = self.matrices
        for _ in range(self.times):
            torch.mm(left, right, out=result)
