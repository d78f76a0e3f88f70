"""The arithmetic of layers and log-probs: products in fp32, the soft cap, norms, activations.

Norms work under sequence parallelism on every device. Each tensor-parallel rank then normalises its
own tokens, so the gradient of weight and bias is a partial sum: the flag `sequence_parallel` makes
megatron-core's finalize_model_grads all-reduce it over the tensor group. (Norms of query and key
heads, which see this rank's heads of all tokens, are all-reduced because of `config.qk_layernorm`.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional
from torch.torch_version import TorchVersion

from exo_megatron.parallel import cpu_backend

LARGEST_TEMPORARY = 64 * 2**20
"""Bytes of the largest fp32 matrix that is made to be added to a sum of gradients."""

# Before, torch asks that the sum has the dtype of the factors (PyTorch, pull request 167931).
_ADDS_WIDER = TorchVersion(torch.__version__) >= "2.10"


def soft_cap_(values: Tensor, cap: float | None) -> Tensor:
    """Compute cap * tanh(values / cap) in place of values; None leaves them unchanged."""
    return values if cap is None else values.div_(cap).tanh_().mul_(cap)


def soft_cap_slope(capped: Tensor, cap: float) -> Tensor:
    """Compute the derivative of the soft cap at each place from its result `capped`."""
    return 1 - (capped / cap).square_()


def multiplicand(matrix: Tensor) -> Tensor:
    """Return the matrix in the form that `product` takes without casting it again.

    Half precision stays as it is on CUDA, whose matrix units accumulate in fp32, and becomes fp32
    elsewhere; fp32 and fp64 stay.
    """
    if matrix.is_cuda or matrix.dtype in (torch.float32, torch.float64):
        return matrix
    return matrix.float()


def product(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Compute left @ right (matrices, or batches of them) in fp32; fp64 for fp64 operands.

    out: overwritten with the result, whose shape and dtype it has; for matrices only.

    Half-precision operands give the fp32 sums of their exact products: the same as a product of
    fp32 copies up to the order of summation, on CUDA without making the copies (needs torch >=
    2.8).
    """
    left, right = multiplicand(left), multiplicand(right)
    if left.dtype in (torch.float32, torch.float64):
        return torch.matmul(left, right, out=out)
    if left.dim() == 2:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.bmm(left, right, out_dtype=torch.float32)


def add_product_(total: Tensor, left: Tensor, right: Tensor, *, fresh: bool = False) -> None:
    """Add left @ right to total in place, or overwrite total with it if `fresh`.

    All are matrices; total is fp32, or fp64 for fp64 operands. No other matrix is allocated, with
    half precision on CUDA and torch before 2.10 none larger than LARGEST_TEMPORARY.
    """
    left, right = multiplicand(left), multiplicand(right)
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=0 if fresh else 1)
    elif _ADDS_WIDER:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=0 if fresh else 1, out=total)
    else:
        add_product_in_chunks_(total, left, right, fresh=fresh)


def add_product_in_chunks_(total: Tensor, left: Tensor, right: Tensor, *, fresh: bool) -> None:
    """Do the work of `add_product_` by products of some rows at a time."""
    rows = max(LARGEST_TEMPORARY // (total.shape[1] * total.element_size()), 1)
    for part, factor in zip(total.split(rows), left.split(rows), strict=True):
        if fresh:
            part.zero_()
        part.add_(product(factor, right))


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


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    if hidden.is_cuda:
        return functional.rms_norm(hidden, weight.shape, weight, eps)
    return cpu_backend.rms_norm(hidden, weight, eps)


def _parameter(config: TransformerConfig, size: int) -> torch.nn.Parameter:
    device = torch.cuda.current_device()
    parameter = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=device))
    vars(parameter)["sequence_parallel"] = config.sequence_parallel
    return parameter


@dataclass(frozen=True)
class Elementwise:
    """A function of every element by itself, as activations are.

    Attributes:
        of: makes a new tensor.
        write: function(x, out).
        write_gradient: function(gradient, x, out), the gradient of x; out may be `gradient`.
    """

    of: Callable[[Tensor], Tensor]
    write: Callable[[Tensor, Tensor], Tensor]
    write_gradient: Callable[[Tensor, Tensor, Tensor], Tensor]


def _gelu(approximate: str) -> Elementwise:
    aten = torch.ops.aten
    return Elementwise(
        lambda x: functional.gelu(x, approximate=approximate),
        lambda x, out: aten.gelu.out(x, approximate=approximate, out=out),
        lambda gradient, x, out: aten.gelu_backward.grad_input(gradient, x, approximate=approximate, grad_input=out),
    )


ACTIVATIONS = {
    "silu": Elementwise(
        functional.silu,
        lambda x, out: torch.ops.aten.silu.out(x, out=out),
        lambda gradient, x, out: torch.ops.aten.silu_backward.grad_input(gradient, x, grad_input=out),
    ),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
}


def gated(both: Tensor, function: Elementwise) -> Tensor:
    """Compute function(gate) * up [..., F] for both = [gate | up] [..., 2F].

    The backward computes the activation again, so that nothing but `both` is kept for it.
    """
    if not torch.is_grad_enabled():
        return _gated(both, function)
    apply: Callable[..., Tensor] = _Gated.apply
    return apply(both, function)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, function: Elementwise) -> Tensor:
        ctx.save_for_backward(both)
        ctx.function = function
        return _gated(both, function)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (both,), (gradient,) = ctx.saved_tensors, gradients
        gate, up = both.chunk(2, dim=-1)
        result = torch.empty_like(both)
        of_gate, of_up = result.chunk(2, dim=-1)
        torch.mul(gradient, up, out=of_gate)
        ctx.function.write_gradient(of_gate, gate, of_gate)
        ctx.function.write(gate, of_up).mul_(gradient)
        return result, None


def _gated(both: Tensor, function: Elementwise) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return function.of(gate).mul_(up)
