"""Normalisation modules that work under sequence parallelism on every device.

Under sequence parallelism each tensor-parallel rank normalises its own rows, so the gradient of weight and bias is a
partial sum: the flag `sequence_parallel` makes megatron-core's finalize_model_grads all-reduce it over TP. (Norms of
query and key heads, which see this rank's heads of all rows, are all-reduced because of `config.qk_layernorm`.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from exo_megatron.parallel import cpu_kernels


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (HF `LlamaRMSNorm`).

    zero_centered: times 1 + weight instead, in fp32 until the result is rounded (HF `GemmaRMSNorm`).
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, zero_centered: bool = False
    ) -> None:
        """Built by megatron-core's layer specs with these arguments."""
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        self.weight = _parameter(config, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H], same dtype."""
        if not self.zero_centered:
            return _rms_norm(hidden, self.weight, self.eps)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return _rms_norm(hidden.to(wide), 1 + self.weight.to(wide), self.eps).to(hidden.dtype)


class LayerNorm(torch.nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension (torch.nn.LayerNorm)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        """Built by megatron-core's layer specs with these arguments."""
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, hidden_size)
        self.bias = _parameter(config, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H], same dtype."""
        return functional.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)


class NormedResidual(torch.nn.Module):
    """The residual connection of models that normalise what they add: residual + norm(output).

    Takes the place of megatron-core's bias-dropout-add, whose calling convention it follows.
    """

    def __init__(self, config: TransformerConfig, zero_centered: bool) -> None:
        super().__init__()
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon, zero_centered)

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """The function that adds; dropout is 0 in training too, and nothing is fused."""
        return self._add

    def _add(self, output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        output, bias = output_with_bias
        normed: Tensor = self.norm(output if bias is None else output + bias)
        return residual + normed


def norm_spec(norm: Literal["rms", "layer"], *, zero_centered: bool) -> ModuleSpec:
    """How megatron-core builds the norms of a model."""
    if norm == "layer":
        return ModuleSpec(module=LayerNorm)
    return ModuleSpec(module=RMSNorm, params={"zero_centered": zero_centered})


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    if hidden.is_cuda:
        return functional.rms_norm(hidden, weight.shape, weight, eps)
    return cpu_kernels.rms_norm(hidden, weight, eps)


def _parameter(config: TransformerConfig, size: int) -> torch.nn.Parameter:
    device = torch.cuda.current_device()
    parameter = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=device))
    vars(parameter)["sequence_parallel"] = config.sequence_parallel
    return parameter
