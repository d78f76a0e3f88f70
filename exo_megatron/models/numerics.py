"""Arithmetic that attention and log-probs share: products in fp32, and the soft cap."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

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
