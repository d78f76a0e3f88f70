"""What stands between the two products of a feed-forward block, in few operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

Name = Literal["silu", "gelu", "gelu_tanh"]


class Activation(MegatronModule):
    """f(x), or f(gate) * up for x = [gate | up] where the block is gated. It has no parameters.

    megatron-core asks for such a module, which gets all that the first product gave, where it would
    ask Transformer Engine (`use_te_activation_func`). Its own fused SwiGLU has 13 operators unless
    torch.compile joins them, which it would do for every length of a micro-batch.
    """

    def __init__(self, config: TransformerConfig, *, name: Name, gated: bool) -> None:
        """Take the arguments with which megatron-core builds it, and those of our layer spec."""
        super().__init__(config=config)
        self.function = FUNCTIONS[name]
        self.gated = gated

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute [..., F] -> [..., F], or [..., 2F] -> [..., F] where it is gated."""
        return gated(hidden, self.function) if self.gated else self.function.of(hidden)


@dataclass(frozen=True)
class Function:
    """An elementwise function.

    Attributes:
        of: makes a new tensor.
        write: function(x, out).
        write_gradient: function(gradient, x, out), the gradient of x; out may be `gradient`.
    """

    of: Callable[[Tensor], Tensor]
    write: Callable[[Tensor, Tensor], Tensor]
    write_gradient: Callable[[Tensor, Tensor, Tensor], Tensor]


def _gelu(approximate: str) -> Function:
    aten = torch.ops.aten
    return Function(
        lambda x: functional.gelu(x, approximate=approximate),
        lambda x, out: aten.gelu.out(x, approximate=approximate, out=out),
        lambda gradient, x, out: aten.gelu_backward.grad_input(gradient, x, approximate=approximate, grad_input=out),
    )


FUNCTIONS = {
    "silu": Function(
        functional.silu,
        lambda x, out: torch.ops.aten.silu.out(x, out=out),
        lambda gradient, x, out: torch.ops.aten.silu_backward.grad_input(gradient, x, grad_input=out),
    ),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
}


def gated(both: Tensor, function: Function) -> Tensor:
    """Compute function(gate) * up [..., F] for both = [gate | up] [..., 2F].

    The backward computes the activation again, so that nothing but `both` is kept for it.
    """
    if not torch.is_grad_enabled():
        return _gated(both, function)
    apply: Callable[..., Tensor] = _Gated.apply
    return apply(both, function)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, function: Function) -> Tensor:
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


def _gated(both: Tensor, function: Function) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return function.of(gate).mul_(up)
