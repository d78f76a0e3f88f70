"""Stand-ins on the CPU for kernels that exist for CUDA only, and for what gloo copies.

Each does in a few passes over memory, into memory that is there already, what torch's or megatron-core's own fallback
does in several new tensors. `cpu_backend` puts them in place of megatron-core's; models/norms.py calls `rms_norm`.
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


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`torch.nn.functional.rms_norm` over the last dimension: [..., H] and [H] -> [..., H], in the type of `hidden`.

    At least in fp32 inside, as there; on CUDA that is one kernel, on the CPU a dozen passes over memory.
    """
    apply: Callable[..., Tensor] = _RMSNorm.apply
    return apply(hidden, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """y = x s w with s = (mean(x^2) + eps)^(-1/2); dx = s g w - s^3/H (sum_h g w x) x; dw = sum over rows of g x s."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        x = rows.to(torch.promote_types(hidden.dtype, torch.float32))
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(rows, weight, scale)
        return torch.mul(x, scale).mul_(weight).to(hidden.dtype).view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, output: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, scale = ctx.saved_tensors
        x, w, gradient = rows.to(scale.dtype), weight.to(scale.dtype), output.reshape(rows.shape).to(scale.dtype)
        result = gradient * x
        of_weight = torch.mv(result.t(), scale.squeeze(-1)).to(weight.dtype)
        along_x = torch.mv(result, w).unsqueeze(-1).mul_(scale.pow(3)).div_(x.shape[-1])
        torch.mul(gradient, w, out=result).mul_(scale).addcmul_(x, along_x, value=-1)
        return result.to(output.dtype).view(output.shape), of_weight, None


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
