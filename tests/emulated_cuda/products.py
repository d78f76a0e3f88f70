"""Matrix products of half precision with results in fp32, which torch has on CUDA only."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """mm or bmm with out_dtype: the fp32 sums of the exact products."""
    if left.dtype != right.dtype:
        raise RuntimeError("input dtypes must be the same")
    if dtype != left.dtype and not (dtype == torch.float32 and left.dtype in HALF):
        raise RuntimeError("out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs")
    return torch.matmul(left.to(dtype), right.to(dtype))


def product_out(left: Tensor, right: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    """The same into a matrix that is there."""
    if out.dtype != dtype:
        raise RuntimeError("out_dtype must be the same as the dtype of the provided out tensor")
    result = product(left, right, dtype)
    if out.shape != result.shape:
        raise RuntimeError(f"out has shape {tuple(out.shape)}, the product {tuple(result.shape)}")
    return out.copy_(result)


def added(
    total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor
) -> Tensor:
    """addmm with out_dtype into a matrix that may be the sum itself; beta 0 does not read the sum."""
    if total.dtype not in (dtype, left.dtype):
        raise RuntimeError("self dtype must match either out_dtype or mat1 dtype")
    result = alpha * product(left, right, dtype)
    if out.shape != result.shape or out.dtype != dtype:
        raise RuntimeError(f"out is {out.dtype} {tuple(out.shape)}, the sum {dtype} {tuple(result.shape)}")
    return out.copy_(result if beta == 0 else result + beta * total.to(dtype))


def grouped(
    left: Tensor, right: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: object = None
) -> Tensor:
    """_grouped_mm of [N, I] and [groups, I, O], and what it asks for; offs: where the rows of each group end."""
    if offs is None or offs.dtype != torch.int32 or not offs.is_cuda or len(offs) != len(right):
        raise RuntimeError("Offsets tensor must be 1D int32 on CUDA, one for each group")
    if not left.dtype == right.dtype == torch.bfloat16:
        raise RuntimeError("Expected inputs of BF16 type")
    for matrix in (left, right):
        strides = matrix.stride()[-2:]
        if 1 not in strides or any(stride % 8 for stride in strides if stride != 1):
            raise RuntimeError(f"strides must be multiples of 16 bytes, are {strides}")
    ends = offs.cpu().tolist()
    if ends[-1] != len(left):
        raise RuntimeError(f"the groups end at {ends[-1]} of {len(left)} rows")
    parts = zip([0, *ends[:-1]], ends, right, strict=True)
    return torch.cat([product(left[first:end], matrix, torch.bfloat16) for first, end, matrix in parts])
