"""Products that are not rounded to half precision, and never copy what is already wide enough."""

from __future__ import annotations

import pytest
import torch

from exo_megatron.models import numerics
from exo_megatron.models.numerics import add_product_, add_product_in_chunks_, multiplicand, product


@pytest.mark.parametrize("shape", [((5, 300), (300, 7)), ((2, 5, 300), (2, 300, 7))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_result_is_wide(shape: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, generator=generator).to(dtype) for size in shape)
    result = product(left, right)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = left.double() @ right.double()
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-4)


def test_wide_multiplicands_are_not_copied() -> None:
    for dtype in (torch.float32, torch.float64):
        matrix = torch.ones(2, 2, dtype=dtype)
        assert multiplicand(matrix) is matrix


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_adding_a_product(dtype: torch.dtype) -> None:
    """A fresh total may hold anything before, not-a-numbers too."""
    left, right = torch.randn(5, 30).to(dtype), torch.randn(30, 7).to(dtype)
    total = torch.full((5, 7), float("nan"), dtype=product(left, right).dtype)
    add_product_(total, left, right, fresh=True)
    add_product_(total, left, right)
    torch.testing.assert_close(total, 2 * product(left, right))


@pytest.mark.parametrize("fresh", [True, False])
def test_adding_a_product_in_chunks(fresh: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows at a time; the last chunk is smaller."""
    made: list[int] = []

    def counted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        made.append(len(left))
        return product(left, right)

    monkeypatch.setattr(numerics, "LARGEST_TEMPORARY", 3 * 7 * 4 + 1)
    monkeypatch.setattr(numerics, "product", counted)
    left, right = torch.randn(8, 30), torch.randn(30, 7)
    total = torch.full((8, 7), float("nan") if fresh else 2.0)
    add_product_in_chunks_(total, left, right, fresh=fresh)
    torch.testing.assert_close(total, (0.0 if fresh else 2.0) + left @ right)
    assert made == [3, 3, 2]
