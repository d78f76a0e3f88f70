"""Stand-ins on the CPU for kernels that megatron-core takes from apex or compiles for CUDA, and for what gloo copies.

Each does in one or two passes over memory, into memory that is there already, what megatron-core's own fallback does in
several new tensors. `cpu_backend` puts them in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(both: Tensor, bias: Tensor | None = None, *unused: object) -> Tensor:
    """silu(gate) * up for both = [gate | up] [..., 2F], plus bias where there is one; result [..., F].

    Stands for megatron-core's `bias_swiglu_impl`; `unused`: fp8 storage and offloading of activations, CUDA only.
    """
    apply: Callable[..., Tensor] = _SwiGLU.apply
    return apply(both if bias is None else both + bias)


def weighted_swiglu(both: Tensor, bias: Tensor | None, weights: Tensor, *unused: object) -> Tensor:
    """`swiglu` of an expert's tokens times their router weights [..., 1], in the type of `both`.

    Stands for megatron-core's `weighted_bias_swiglu_impl`.
    """
    return (swiglu(both, bias) * weights).to(both.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        result = torch.empty_like(both)
        of_gate, of_up = result.chunk(2, dim=-1)
        torch.mul(gradient, up, out=of_gate)
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        torch.ops.aten.silu.out(gate, out=of_up).mul_(gradient)
        return result


class WeightGradients:
    """Stands for apex's module `fused_weight_gradient_mlp_cuda`, with which a layer adds to `main_grad` itself."""

    @staticmethod
    def wgrad_gemm_accum_fp32(rows: Tensor, gradient: Tensor, total: Tensor) -> None:
        """total [O, I] += gradient^T rows, for rows [N, I] and gradient [N, O] of any precision; total in fp32."""
        total.addmm_(gradient.t().to(total.dtype), rows.to(total.dtype))


def scale(_chunk: int, _overflow: Tensor, tensors: Sequence[Sequence[Tensor]], factor: float) -> None:
    """Write factor times each of tensors[0] to its counterpart in tensors[1], which may be the same.

    Stands for apex's `multi_tensor_scale`.
    """
    for source, target in zip(*tensors, strict=True):
        torch.mul(source, factor, out=target)


def unless_alone(collective: Callable[..., object]) -> Callable[..., object]:
    """A reduce-scatter or all-gather that leaves out what gloo would copy onto itself.

    The shard of a rank alone in its group is the whole buffer.
    """

    def run(output: Tensor, input: Tensor, *args: Any, group: torch.distributed.ProcessGroup, **kwargs: Any) -> object:
        if group.size() == 1 and output.data_ptr() == input.data_ptr():
            return None
        return collective(output, input, *args, group=group, **kwargs)

    return run
