"""Norms, and the residual connections that contain them.

Norms work under sequence parallelism on every device. Each tensor-parallel rank then normalises its
own tokens, so the gradient of weight and bias is a partial sum: the flag `sequence_parallel` makes
megatron-core's finalize_model_grads all-reduce it over the tensor group. (Norms of query and key
heads, which see this rank's heads of all tokens, are all-reduced because of `config.qk_layernorm`.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from exo_megatron.parallel import cpu_backend


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (HF `LlamaRMSNorm`).

    zero_centered: the factor is 1 + weight instead, in fp32 until the result is rounded (HF
    `GemmaRMSNorm`).
    """

    one: Tensor

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, zero_centered: bool = False
    ) -> None:
        """Accept the arguments with which megatron-core's layer specs build norms."""
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        self.weight = _parameter(config, hidden_size)
        if zero_centered:  # of at least fp32, and of one dimension: the sum with a weight has its dtype
            one = torch.ones(1, dtype=torch.promote_types(config.params_dtype, torch.float32))
            self.register_buffer("one", one.to(self.weight.device), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise [..., H] -> [..., H], in the same dtype."""
        if not self.zero_centered:
            return _rms_norm(hidden, self.weight, self.eps)
        return _rms_norm(hidden.to(self.one.dtype), self.one + self.weight, self.eps).to(hidden.dtype)


class LayerNorm(torch.nn.Module):
    """torch.nn.LayerNorm: (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        """Accept the arguments with which megatron-core's layer specs build norms."""
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, hidden_size)
        self.bias = _parameter(config, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise [..., H] -> [..., H], in the same dtype."""
        return functional.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)


class NormedResidual(torch.nn.Module):
    """The residual connection of models that normalise what they add: residual + norm(output).

    It replaces megatron-core's bias-dropout-add and follows its calling convention.
    """

    def __init__(self, config: TransformerConfig, zero_centered: bool) -> None:
        super().__init__()
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon, zero_centered)

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """Return the function that adds. Dropout is 0 in training too, and nothing is fused."""
        return self._add

    def _add(self, output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        output, bias = output_with_bias
        normed: Tensor = self.norm(output if bias is None else output + bias)
        return residual + normed


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    if hidden.is_cuda:
        return functional.rms_norm(hidden, weight.shape, weight, eps)
    return cpu_backend.rms_norm(hidden, weight, eps)


def _parameter(config: TransformerConfig, size: int) -> torch.nn.Parameter:
    device = torch.cuda.current_device()
    parameter = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=device))
    vars(parameter)["sequence_parallel"] = config.sequence_parallel
    return parameter


def plain_residual(training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
    """Return the function that adds. Dropout is 0 in training too, and nothing is fused.

    It replaces megatron-core's bias-dropout-add and follows its calling convention.
    """
    return _added


def _added(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
    output, bias = output_with_bias
    return residual + (output if bias is None else output + bias)
