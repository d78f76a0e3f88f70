"""Gated activations: against plain formulas, and what they keep for the backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from exo_megatron.models.numerics import ACTIVATIONS, gated

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain(name: str, both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return PLAIN[name](gate) * up


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_by_differences(name: str) -> None:
    assert torch.autograd.gradcheck(lambda both: gated(both, ACTIVATIONS[name]), [random(5, 3, 12).requires_grad_()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_are_those_of_hf(name: str, dtype: torch.dtype) -> None:
    """Bit for bit, in half precision too, where rounding twice or once makes a difference."""
    both = random(50, 12, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(gated(both, ACTIVATIONS[name]), plain(name, both))
    assert torch.equal(gated(both.requires_grad_(), ACTIVATIONS[name]), plain(name, both))
    assert torch.equal(ACTIVATIONS[name].of(both), PLAIN[name](both))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_are_those_of_autograd(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """In fp64; the gradient that comes in stays as it is, and only the input is kept."""
    both, gradient = random(50, 12, dtype=dtype).requires_grad_(), random(50, 6, dtype=dtype, seed=1)
    wide, given = both.detach().double().requires_grad_(), gradient.clone()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = gated(both, ACTIVATIONS[name])
    assert len(kept) == 1 and kept[0].data_ptr() == both.data_ptr()
    (ours,) = torch.autograd.grad(output, both, gradient)
    (theirs,) = torch.autograd.grad(plain(name, wide), wide, gradient.double())
    assert ours.dtype == dtype and torch.equal(gradient, given)
    assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()
