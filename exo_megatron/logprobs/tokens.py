"""The tokens of a packed row as the vocabulary projection sees them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """N response tokens on M rows: of each row the first, and the N - M extra ones of rows that predict several."""

    row: Tensor  # [N]
    first_target: Tensor  # [M]
    extra: Tensor  # [N - M], which of the N these are
    extra_row: Tensor
    extra_target: Tensor

    @classmethod
    def of(cls, row: Tensor, target: Tensor, rows: int) -> Tokens:
        """row [N] non-decreasing, each of 0..M-1 in it; target [N]. Without waiting for the device."""
        first = torch.searchsorted(row, torch.arange(rows, device=row.device))
        repeats = torch.zeros_like(row)
        repeats[1:] = row[1:] == row[:-1]
        # Sorted, not selected by the mask: how many there are is known without asking the device.
        extra = torch.argsort(repeats, stable=True)[rows:]
        return cls(row, target[first], extra, row[extra], target[extra])
