"""Variable-length flash attention as the CUDA build of torch has it, in fp64 inside, and as strict as that or stricter.

What it demands and returns is that of torch 2.13's `_flash_attention_forward` and `_flash_attention_backward` with
cumulative lengths (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, `mha_varlen_fwd` and
`mha_varlen_bwd`). Where the real one reads wrong memory without a word (a log-sum-exp of another shape or stride,
lengths that do not add up to the tokens, a maximum below a length), this one raises.

It also takes fp32, which the real one refuses, so that it can be compared to 1e-5.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD, HEAD_MULTIPLE = 256, 8


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    longest_query: int,
    longest_key: int,
    dropout: float,
    causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **unsupported: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output [tokens, heads, d], log-sum-exp [heads, tokens] fp32, and three tensors that nobody reads."""
    _require(not any(each is not None for each in unsupported.values()), f"{unsupported} are not emulated")
    _require(not return_debug_mask, "return_softmax is only supported when p_dropout > 0.0")
    _check(query, key, value, query_bounds, key_bounds, longest_query, longest_key, dropout)
    _check_single_queries(query, key, query_bounds, longest_query, (window_size_left, window_size_right))
    q, k, v = (_wide(each) for each in (query, key, value))
    scores = _scores(q, k, _scale(query, scale))
    scores.masked_fill_(_hidden(query_bounds, key_bounds, causal, window_size_left, window_size_right), -math.inf)
    lse = scores.logsumexp(-1)
    unseeing = lse.isneginf()
    weights = (scores - lse.masked_fill(unseeing, 0.0).unsqueeze(-1)).exp()
    output = torch.einsum("hqk,khd->qhd", weights, _per_query_head(v, q))
    lse.masked_fill_(unseeing, math.inf)  # as in the real one, where a query sees no key
    unread = torch.empty(2, dtype=torch.uint64, device=query.device)
    nothing = torch.empty(0, dtype=query.dtype, device=query.device)
    return _narrow(output, query), lse.float().to(query.device), unread, unread[0].clone(), nothing


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    longest_query: int,
    longest_key: int,
    dropout: float,
    causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, with P = exp(scores - lse) and delta = rowsum(grad * output)."""
    _check(query, key, value, query_bounds, key_bounds, longest_query, longest_key, dropout)
    for name, each in (("out", output), ("dout", grad)):
        _require(each.is_cuda, f"{name} must be on CUDA")
        _require(each.dtype == query.dtype, f"query and {name} must have the same dtype")
        _require(each.shape == query.shape, f"{name} must have shape {tuple(query.shape)}, not {tuple(each.shape)}")
    _require(lse.is_cuda and lse.dtype == torch.float32, f"softmax_lse must be fp32 on CUDA, not {lse.dtype}")
    heads_first = tuple(query.shape[1::-1])
    _require(
        tuple(lse.shape) == heads_first, f"softmax_lse must be [heads, tokens] {heads_first}, not {tuple(lse.shape)}"
    )
    _require(lse.is_contiguous(), "softmax_lse must be contiguous")
    q, k, v, out, d_out = (_wide(each) for each in (query, key, value, output, grad))
    factor = _scale(query, scale)
    weights = (_scores(q, k, factor) - lse.cpu().double().unsqueeze(-1)).exp()
    weights.masked_fill_(_hidden(query_bounds, key_bounds, causal, window_size_left, window_size_right), 0.0)
    delta = (d_out * out).sum(-1).t().unsqueeze(-1)
    d_scores = weights * (torch.einsum("qhd,khd->hqk", d_out, _per_query_head(v, q)) - delta) * factor
    dq = torch.einsum("hqk,khd->qhd", d_scores, _per_query_head(k, q))
    dk = _per_key_head(torch.einsum("hqk,qhd->khd", d_scores, q), k)
    dv = _per_key_head(torch.einsum("hqk,qhd->khd", weights, d_out), v)
    return _narrow(dq, query), _narrow(dk, key), _narrow(dv, value)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    longest_query: int,
    longest_key: int,
    dropout: float,
) -> None:
    _require(dropout == 0.0, "dropout is not emulated")
    _require(query.dtype in DTYPES, "FlashAttention only support fp16 and bf16 data type")
    for name, each in (("query", query), ("key", key), ("value", value)):
        _require(each.is_cuda, f"{name} must be on CUDA")
        _require(each.dtype == query.dtype, f"query and {name} must have the same dtype")
        _require(each.dim() == 3, f"{name} must have 3 dimensions, not {each.dim()}")
        _require(each.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    _, heads, size = query.shape
    _require(size <= LARGEST_HEAD, "FlashAttention only supports head dimension at most 256")
    _require(size % HEAD_MULTIPLE == 0, "head_size must be a multiple of 8")
    _require(key.shape == value.shape, f"key {tuple(key.shape)} and value {tuple(value.shape)} differ in shape")
    _require(key.shape[2] == size, f"key must have heads of {size}, not {key.shape[2]}")
    _require(heads % key.shape[1] == 0, "Number of heads in key/value must divide number of heads in query")
    _require(query_bounds.shape == key_bounds.shape, "cu_seqlens_q and cu_seqlens_k must have the same shape")
    _check_bounds("cu_seqlens_q", query_bounds, longest_query, query.shape[0])
    _check_bounds("cu_seqlens_k", key_bounds, longest_key, key.shape[0])


def _check_bounds(name: str, bounds: Tensor, longest: int, tokens: int) -> None:
    _require(bounds.dtype == torch.int32, f"{name} must have dtype int32")
    _require(bounds.is_cuda, f"{name} must be on CUDA")
    _require(bounds.dim() == 1 and bounds.is_contiguous(), f"{name} must be contiguous")
    _require(bounds.numel() > 1, "batch size must be positive")
    ends = bounds.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(ends)]
    _require(ends[0] == 0 and ends[-1] == tokens, f"{name} goes from {ends[0]} to {ends[-1]}, not from 0 to {tokens}")
    _require(min(lengths) >= 0, f"{name} falls: {ends}")
    _require(max(lengths) <= longest, f"{name} has a length of {max(lengths)}, above the maximum {longest}")


def _check_single_queries(
    query: Tensor, key: Tensor, bounds: Tensor, longest: int, window: tuple[int | None, int | None]
) -> None:
    """With one query per block and grouped heads the real one swaps the two, and fails on a block without a query."""
    if longest == 1 and query.shape[1] > key.shape[1] and all(each is None or each < 0 for each in window):
        blocks = bounds.numel() - 1
        _require(query.shape[0] == blocks, f"shape '[{blocks}, ...]' is invalid for {query.shape[0]} queries")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _narrow(tensor: Tensor, original: Tensor) -> Tensor:
    return tensor.to(original.dtype).to(original.device)


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _per_query_head(heads: Tensor, query: Tensor) -> Tensor:
    """[k, key heads, d] -> [k, query heads, d]."""
    return heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1)


def _per_key_head(heads: Tensor, key: Tensor) -> Tensor:
    """Sums of [k, query heads, d] -> [k, key heads, d]."""
    return heads.view(heads.shape[0], key.shape[1], -1, heads.shape[2]).sum(2)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[heads, queries, keys], of all blocks with all."""
    return torch.einsum("qhd,khd->hqk", q, _per_query_head(k, q)) * scale


def _hidden(query_bounds: Tensor, key_bounds: Tensor, causal: bool, left: int | None, right: int | None) -> Tensor:
    """[queries, keys], whether the query does not see the key: one of another block, or outside of the window.

    The last query of a block is at the place of its last key.
    """
    queries, keys = query_bounds.cpu().long().diff(), key_bounds.cpu().long().diff()
    blocks = torch.arange(queries.shape[0])
    query_block, key_block = blocks.repeat_interleave(queries), blocks.repeat_interleave(keys)
    query_place = torch.arange(query_block.shape[0]) - (query_bounds.cpu()[:-1] + queries - keys)[query_block]
    key_place = torch.arange(key_block.shape[0]) - key_bounds.cpu()[:-1][key_block]
    ahead = key_place - query_place.unsqueeze(1)
    hidden = key_block != query_block.unsqueeze(1)
    right = 0 if causal else right
    if right is not None and right >= 0:
        hidden |= ahead > right
    if left is not None and left >= 0:
        hidden |= ahead < -left
    return hidden
