"""The last layer of a reward model."""

from __future__ import annotations

import torch
from torch import Tensor

from exo_megatron.models.products import product


class ScoreHead(torch.nn.Module):
    """Linear from hidden states to a few outputs, without bias (`score` of HF's ...ForSequenceClassification).

    The whole of it is on every tensor-parallel rank of the last stage.
    """

    def __init__(self, labels: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(labels, hidden_size, dtype=dtype, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """[C, H] -> [C, labels] fp32, equal on all tensor-parallel ranks."""
        return product(hidden, self.weight.t())
