"""Calls of the emulated operators that a GPU refuses, or answers with wrong numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CUDA = torch.device("cuda", 0)
TOKENS, HEADS, KEY_HEADS, SIZE = 6, 4, 2, 16


def refusals() -> dict[str, str]:
    """What is said to each of the calls; "" where nothing is."""
    calls: dict[str, tuple[Any, ...]] = {
        "int64 bounds": (_forward, {"query_bounds": _bounds().long()}),
        "bounds on the CPU": (_forward, {"key_bounds": _bounds().cpu()}),
        "bounds of fewer tokens": (_forward, {"query_bounds": _bounds() - _bounds() // 6}),
        "maximum below a length": (_forward, {"longest_query": 3}),
        "query on the CPU": (_forward, {"query": _heads(HEADS).cpu()}),
        "strided last dimension": (_forward, {"query": _heads(HEADS).mT.contiguous().mT}),
        "fp64": (_forward, {name: _heads(heads).double() for name, heads in _OPERANDS.items()}),
        "dtypes that differ": (_forward, {"value": _heads(KEY_HEADS).bfloat16()}),
        "heads of 12": (_forward, {name: _heads(heads)[..., :12] for name, heads in _OPERANDS.items()}),
        "heads of 264": (_forward, {name: _heads(heads, 264) for name, heads in _OPERANDS.items()}),
        "heads that do not divide": (_forward, {"query": _heads(3)}),
        "one query, a block without": (_forward, _single_queries()),
        "dropout": (_forward, {"dropout": 0.1}),
        "transposed sums": (_backward, {"lse": _sums().t().contiguous()}),
        "strided sums": (_backward, {"lse": _sums().t().contiguous().t()}),
        "half-precision sums": (_backward, {"lse": _sums().bfloat16()}),
        "output of another dtype": (_backward, {"output": _heads(HEADS).bfloat16()}),
        "gradient of another shape": (_backward, {"grad": _heads(KEY_HEADS)}),
        "product of two dtypes": (_product, torch.float32, torch.bfloat16, torch.float32),
        "product of fp32 in bf16": (_product, torch.float32, torch.float32, torch.bfloat16),
        "product with the CPU": (lambda: torch.ones(2, 2, device=CUDA) @ torch.ones(2, 2),),
        "sum with the CPU": (lambda: torch.add(torch.ones(2, device=CUDA), torch.ones(2)),),
    }
    return {name: _said(function, *arguments) for name, (function, *arguments) in calls.items()}


_OPERANDS = {"query": HEADS, "key": KEY_HEADS, "value": KEY_HEADS}


def accepted() -> None:
    """The calls as they are right."""
    _forward({})
    _backward({})


def _said(function: Any, *arguments: Any) -> str:
    try:
        function(*arguments)
    except RuntimeError as error:
        return str(error)
    return ""


def _heads(heads: int, size: int = SIZE) -> Tensor:
    return torch.ones(TOKENS, heads, size, device=CUDA)


def _bounds() -> Tensor:
    return torch.tensor([0, 2, TOKENS], dtype=torch.int32).to(CUDA)


def _sums() -> Tensor:
    return torch.zeros(HEADS, TOKENS, device=CUDA)


def _single_queries() -> dict[str, Any]:
    bounds = torch.tensor([0, 1, 1], dtype=torch.int32).to(CUDA)
    return {"query": _heads(HEADS)[:1], "query_bounds": bounds, "longest_query": 1}


def _call(changes: dict[str, Any]) -> dict[str, Any]:
    right: dict[str, Any] = {name: _heads(heads) for name, heads in _OPERANDS.items()}
    right |= {"query_bounds": _bounds(), "key_bounds": _bounds(), "longest_query": 4, "longest_key": 4}
    return right | {"dropout": 0.0} | changes


def _forward(changes: dict[str, Any]) -> None:
    torch.ops.aten._flash_attention_forward(*_call(changes).values(), True, False, scale=0.3)


def _backward(changes: dict[str, Any]) -> None:
    own = {"grad": _heads(HEADS), "output": _heads(HEADS), "lse": _sums()} | changes
    query, key, value, *rest = _call({}).values()
    unread = torch.empty(2, dtype=torch.uint64, device=CUDA)
    torch.ops.aten._flash_attention_backward(
        own["grad"], query, key, value, own["output"], own["lse"], *rest, True, unread, unread, scale=0.3
    )


def _product(left: torch.dtype, right: torch.dtype, result: torch.dtype) -> None:
    torch.mm(torch.ones(2, 2, dtype=left, device=CUDA), torch.ones(2, 2, dtype=right, device=CUDA), out_dtype=result)
