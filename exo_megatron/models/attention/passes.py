"""Operands and results of an attention pass, and the description of what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class QKV(NamedTuple):
    """Query [N, hq, d], key and value [Q, hkv, d], or their gradients.

    In dense kernels [b, heads, tokens, d].
    """

    query: Tensor
    key: Tensor
    value: Tensor


class Attended(NamedTuple):
    """The result of attention: output [N, hq, d] and LSE [hq, N].

    In dense kernels [b, hq, q, d] and [b, hq, q]. LSE, the log-sum-exp of each query's scores, is
    fp32 (fp64 for fp64 inputs); for a query that sees no key it is -inf, and the output is 0.
    """

    output: Tensor
    lse: Tensor


@dataclass(frozen=True)
class ScoreRule:
    """The score of a query and a key: scale * q.k, then c * tanh(score / c) with a soft cap c.

    window: a query at position p sees keys at positions above p - window only; None: no such limit.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None


@dataclass(frozen=True)
class AttentionPass:
    """One pass: block i of the queries sees block i of the keys, all of it or causally.

    Block i of the queries is the `query_lengths[i]` tokens of the query tensor from token
    `query_starts[i]`, block i of the keys the `key_lengths[i]` tokens of the key tensor from
    `key_starts[i]`. In a causal block the last key is that of the last query.

    Attributes:
        causal: whether a query sees only keys up to its own place in the block.
        query_index, key_index: [N] and [Q] int64, the same tokens, block after block; None: all
            tokens of the tensor, in order. On the device, as all tensors here.
        query_starts, key_starts: empty in a pass for variable-length kernels alone, whose blocks of
            keys are not consecutive tokens.
        query_bounds, key_bounds: [blocks + 1] int32, cumulative lengths.
        query_positions, key_positions: int64, the position in its text of every token of the
            tensors.
        longest: tokens of the longest text, from the first key that a query sees to that query.
    """

    causal: bool
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    query_starts: tuple[int, ...]
    key_starts: tuple[int, ...]
    query_index: Tensor | None
    key_index: Tensor | None
    query_bounds: Tensor
    key_bounds: Tensor
    query_positions: Tensor
    key_positions: Tensor
    longest: int


class StoredTensor:
    """A tensor of an earlier pass that later ones read: `value`, and the sum of their gradients."""

    def __init__(self, value: Tensor) -> None:
        self.value = value.detach()
        self._gradient: Tensor | None = None

    @property
    def gradient(self) -> Tensor:
        """The sum of gradients, of the shape of `value`, to add to; fp32 (fp64 for fp64)."""
        if self._gradient is None:
            dtype = torch.promote_types(self.value.dtype, torch.float32)
            self._gradient = torch.zeros(self.value.shape, dtype=dtype, device=self.value.device)
        return self._gradient


class StoredKeyValue(NamedTuple):
    """Keys and values [Q, hkv, d] of an earlier pass, rotated."""

    key: StoredTensor
    value: StoredTensor
