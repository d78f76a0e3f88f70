"""Groups of different K as one padded matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RaggedGroups:
    """C candidates of G groups, as [G, max K] matrices. `mask` is True where a group has that candidate."""

    index: Tensor
    mask: Tensor

    @classmethod
    def of(cls, group_sizes: Sequence[int], device: torch.device) -> RaggedGroups:
        """group_sizes: the K of each group; at least one group."""
        width = max(group_sizes)
        sizes = torch.tensor(group_sizes).to(device, non_blocking=True)
        columns = torch.arange(width, device=device)
        mask = columns < sizes[:, None]
        first = sizes.cumsum(0) - sizes
        return cls(torch.where(mask, first[:, None] + columns, 0), mask)

    def pad(self, values: Tensor, fill: float) -> Tensor:
        """[C] -> [G, max K] with `fill` where there is no candidate; differentiable."""
        return torch.where(self.mask, values[self.index], fill)
