"""Changes of the project that the tests must find. Each is made in the process of one case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from exo_megatron.models import main_grad
from exo_megatron.models.attention.kernels import FlashVarlenKernels
from exo_megatron.models.numerics import product
from exo_megatron.training import gradients, step
from tests.fake_cuda.device import DEVICE, Stream


def cpu_tensor_in_a_collective() -> None:
    """Reduce a number that is on the CPU, in every micro-batch."""
    _before(step, "_forward_step", lambda *args, **kwargs: dist.all_reduce(torch.zeros(1)))


def strided_tensor_in_a_collective() -> None:
    """Reduce a transposed matrix."""
    _before(step, "_forward_step", lambda *args, **kwargs: dist.all_reduce(torch.zeros(2, 3, device=DEVICE).t()))


def item_in_the_loss() -> None:
    """Read the loss of every micro-batch."""
    _before(step, "_loss", lambda total, **kwargs: total.item())


def number_from_the_host() -> None:
    """Copy a number to the device for the loss of every micro-batch."""
    _before(step, "_loss", lambda total, **kwargs: torch.ones(1).to(total.device))


def item_in_the_backward() -> None:
    """Read the gradient of the pipeline stage's output, on autograd's thread."""
    original = step.stage_output

    def read(*args: Any) -> Any:
        output = original(*args)
        output.register_hook(lambda gradient: gradient * gradient.sum().item())
        return output

    vars(step)["stage_output"] = read


def copy_in_every_layer() -> None:
    """One more operator in the forward pass of attention."""
    original = FlashVarlenKernels.merge

    def merge(self: FlashVarlenKernels, merged: Any, *args: Any) -> None:
        merged.output.clone()
        original(self, merged, *args)

    of_kernels: Any = FlashVarlenKernels
    of_kernels.merge = merge


def norm_read_by_the_host() -> None:
    """Wait for the norm before the optimizer."""
    original = gradients._global_norm

    def read(*args: Any) -> Any:
        norm = original(*args)
        return norm * norm.item()

    vars(gradients)["_global_norm"] = read


def copy_that_nobody_waits_for() -> None:
    """Leave out the wait of the present stream for the stream of copies."""
    of_stream: Any = Stream
    of_stream.wait_stream = lambda self, other: None


def copy_that_is_not_shared() -> None:
    """Let the stream of copies use the memory of a copy again while the present one reads it."""
    of_tensor: Any = torch.Tensor
    of_tensor.record_stream = lambda self, stream: None


def whole_weight_gradient() -> None:
    """Make the fp32 gradient of every linear before it is added."""

    def add(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        total.add_(product(left, right))

    vars(main_grad)["add_product_"] = add


def _before(module: Any, name: str, extra: Callable[..., object]) -> None:
    original = vars(module)[name]

    def changed(*args: Any, **kwargs: Any) -> Any:
        extra(*args, **kwargs)
        return original(*args, **kwargs)

    vars(module)[name] = changed
