"""Normalisation modules that work under sequence parallelism on every device."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (HF `LlamaRMSNorm`).

    Under sequence parallelism each tensor-parallel rank normalises its own rows, so the weight's gradient is a
    partial sum: the flag `sequence_parallel` makes megatron-core's finalize_model_grads all-reduce it over TP.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        """Built by megatron-core's layer specs with these arguments."""
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        vars(self.weight)["sequence_parallel"] = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H], same dtype."""
        return functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
