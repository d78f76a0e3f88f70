"""Which tensor-parallel linear modules the layers are made of."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


@dataclass(frozen=True)
class LinearBackend:
    """The part of megatron-core's backend protocol that dense layers ask for. Norms are never fused into linears."""

    column: Any
    row: Any

    def column_parallel_linear(self) -> Any:
        """Linear cut along its output."""
        return self.column

    def row_parallel_linear(self) -> Any:
        """Linear cut along its input."""
        return self.row

    def fuse_layernorm_and_linear(self) -> bool:
        """Unfused, so that tensors have the same names with and without Transformer Engine."""
        return False


def linear_backend(dtype: torch.dtype) -> LinearBackend:
    """Transformer Engine's linears where it works and there is a GPU, megatron-core's own elsewhere.

    dtype: of the parameters. In fp32 they are megatron-core's as well, because Transformer Engine multiplies fp32
    matrices in TF32, with 10 bits of mantissa, whatever torch is told.
    """
    if torch.cuda.is_available() and dtype != torch.float32:
        from megatron.core.extensions import transformer_engine

        if transformer_engine.HAVE_TE:  # it imports, and its torch part, too
            return LinearBackend(transformer_engine.TEColumnParallelLinear, transformer_engine.TERowParallelLinear)
    return LinearBackend(ColumnParallelLinear, RowParallelLinear)


def add_gradients_in_place(model: torch.nn.Module) -> None:
    """Let megatron-core's own linear layers add the gradients of their weights to its buffers (`main_grad`) themselves.

    They then make no matrix of the weight's size per backward pass, and do not round its sum to half precision. For a
    model whose parameters have such buffers. No effect on CUDA without apex, whose kernel does it there, and on the
    layers of Transformer Engine.
    """
    if torch.cuda.is_available() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        return
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            module.gradient_accumulation_fusion = True
