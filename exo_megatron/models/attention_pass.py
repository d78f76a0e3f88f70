"""What an attention pass is: its operands, which queries see which keys, and how a score is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from exo_megatron.models.layout import GroupLayout


class QKV(NamedTuple):
    """Query [N, hq, d], key and value [Q, hkv, d], or their gradients. In dense kernels [b, heads, rows, d]."""

    query: Tensor
    key: Tensor
    value: Tensor


class Attended(NamedTuple):
    """What attention gives: output [N, hq, d] and LSE [hq, N]. In dense kernels [b, hq, q, d] and [b, hq, q].

    LSE, the log-sum-exp of each query's scores, is fp32 (fp64 for fp64 inputs); of a query that sees no key it is
    -inf, and its output 0.
    """

    output: Tensor
    lse: Tensor


@dataclass(frozen=True)
class ScoreRule:
    """How a score is made of a query and a key: scale * q.k, then c * tanh(score / c) if there is a soft cap c.

    window: a query at position p sees keys at positions above p - window only; None: no such limit.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None


@dataclass(frozen=True)
class AttentionPass:
    """Which queries see which keys: block i of the queries sees block i of the keys, all of it or causally.

    Block i of the queries is the `query_lengths[i]` rows of the query tensor from row `query_starts[i]`, that of the
    keys the `key_lengths[i]` rows of the key tensor from `key_starts[i]`. A causal block has as many keys as queries.

    On the device: query_rows [N] and key_rows [Q] int64 are the same rows, block after block (None: all rows of the
    tensor, in order), delimited by query_bounds and key_bounds [blocks + 1] int32. query_positions and key_positions
    int64 hold the position in its text of every row of the tensors. longest: tokens of the longest text, from the
    first key that a query sees to that query.
    """

    causal: bool
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    query_starts: tuple[int, ...]
    key_starts: tuple[int, ...]
    query_rows: Tensor | None
    key_rows: Tensor | None
    query_bounds: Tensor
    key_bounds: Tensor
    query_positions: Tensor
    key_positions: Tensor
    longest: int


def segment_pass(layout: GroupLayout) -> AttentionPass:
    """The first pass over a packed row: every segment (prompt, candidate, padding) causally over itself."""
    lengths, bounds, positions = layout.segment_lengths, layout.segment_cu_seqlens, layout.position_ids
    starts = tuple(accumulate(lengths[:-1], initial=0))
    return AttentionPass(
        causal=True,
        query_lengths=lengths,
        key_lengths=lengths,
        query_starts=starts,
        key_starts=starts,
        query_rows=None,
        key_rows=None,
        query_bounds=bounds,
        key_bounds=bounds,
        query_positions=positions,
        key_positions=positions,
        longest=max(lengths),
    )


def prompt_pass(layout: GroupLayout) -> AttentionPass:
    """The second pass: the responses of each group, one block of queries, over their prompt."""
    return AttentionPass(
        causal=False,
        query_lengths=tuple(group.response_total for group in layout.groups),
        key_lengths=tuple(group.prompt_length for group in layout.groups),
        query_starts=tuple(group.response_start for group in layout.groups),
        key_starts=tuple(group.start for group in layout.groups),
        query_rows=layout.response_rows,
        key_rows=layout.prompt_rows,
        query_bounds=layout.response_cu_seqlens,
        key_bounds=layout.prompt_cu_seqlens,
        query_positions=layout.position_ids,
        key_positions=layout.position_ids,
        longest=max(group.prompt_length + max(group.response_lengths, default=0) for group in layout.groups),
    )


def group_passes(layout: GroupLayout) -> tuple[AttentionPass, ...]:
    """The passes over a packed row: the first, and the second where there are candidates."""
    if not layout.response_rows.shape[0]:
        return (segment_pass(layout),)
    return segment_pass(layout), prompt_pass(layout)
