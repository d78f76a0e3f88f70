"""Windows by the flash operator of CUDA, which here is a few lines after its definition, against a dense mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from exo_megatron.models.attention import kernels
from exo_megatron.models.attention.passes import ScoreRule
from tests.unit.models.attention.test_kernels import LAYOUTS, compare, make_layout, random_qkv

NO_LIMIT = 10**6


def blocks(q: Tensor, k: Tensor, given: tuple[Any, ...], scale: float, window: dict[str, int]) -> Iterator[Any]:
    """Slices of queries and keys, and scores: query i of n sees keys i + m - n - left to i + m - n + right of m."""
    query_bounds, key_bounds, longest_query, longest_key, _, causal = given[:6]
    repeats = q.shape[1] // k.shape[1]
    for (a, b), (c, d) in zip(pairwise(query_bounds.tolist()), pairwise(key_bounds.tolist()), strict=True):
        assert b - a <= longest_query and d - c <= longest_key
        ago = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        right = 0 if causal else window.get("window_size_right", NO_LIMIT)
        hidden = (ago > window.get("window_size_left", NO_LIMIT)) | (-ago > right)
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d].repeat_interleave(repeats, 1)) * scale
        yield slice(a, b), slice(c, d), scores.masked_fill(hidden, float("-inf"))


def forward(q: Tensor, k: Tensor, v: Tensor, *given: Any, scale: float, **window: int) -> tuple[Any, ...]:
    output, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
    for queries, keys, scores in blocks(q, k, given, scale, window):
        lse[:, queries] = scores.logsumexp(-1)
        values = v[keys].repeat_interleave(q.shape[1] // v.shape[1], 1)
        output[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return output, lse, None, None, None


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, *given: Any, scale: float, **window: int
) -> list[Tensor]:
    """By autograd, of sum(P (grad v - delta)) with P = exp(scores - lse) and delta held."""
    q, k, v = (each.detach().requires_grad_() for each in (q, k, v))
    total = torch.zeros((), dtype=q.dtype)
    with torch.enable_grad():
        for queries, keys, scores in blocks(q, k, given, scale, window):
            values = v[keys].repeat_interleave(q.shape[1] // v.shape[1], 1)
            weights = (scores - lse[:, queries, None]).exp()
            delta = (grad[queries] * output[queries]).sum(-1).t()[:, :, None]
            towards = torch.einsum("qhd,khd->hqk", grad[queries], values)
            total = total + (weights * towards).sum() - (weights * delta).sum()
    return list(torch.autograd.grad(total, (q, k, v)))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """Replaces the operator, and counts the windows that it is asked for."""
    seen: list[dict[str, int]] = []

    def counted(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        seen.append({name: size for name, size in kwargs.items() if name != "scale"})
        return forward(*args, **kwargs)

    monkeypatch.setattr(kernels, "may_use_flash_varlen", lambda device, dtype, *, softcap: softcap is None)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", counted)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    return seen


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("window", [2, 4, 9, 10, 11, 14, 15, 50, None])
def test_against_dense_mask(name: str, window: int | None, calls: list[dict[str, int]]) -> None:
    """Windows that end inside a candidate, inside its prompt, between them, and beyond: RAGGED's texts have 6 to 15."""
    groups, multiple = LAYOUTS[name]
    layout = make_layout(groups, multiple)
    cuts = window is not None and window < max((p + max(rs) for p, rs in groups), default=4)
    compare(groups, layout, random_qkv(layout.num_tokens, 6, 2, torch.float64), 1e-13, ScoreRule(0.37, None, window))
    whole = [{}] if not groups else [{}, {}]
    assert calls == ([{"window_size_left": window - 1, "window_size_right": 0}] if cuts and window else whole)


def test_layers_share_the_pass_of_their_window() -> None:
    groups, multiple = LAYOUTS["ragged groups and padding"]
    layout = make_layout(groups, multiple)
    assert layout.windowed_pass(4) is layout.windowed_pass(4)
    assert layout.windowed_pass(5) is not layout.windowed_pass(4)
    assert replace(layout).windowed == {}  # a copy, as on another device, makes its own
