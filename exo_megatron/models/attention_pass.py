"""What an attention pass is: which queries see which keys, and how a score is made of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from exo_megatron.models.layout import GroupLayout


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

    Blocks lie one after another. query_lengths, key_lengths: tokens of each block; query_bounds, key_bounds
    [blocks + 1] int32 on the device: the same, cumulative. A causal block has as many keys as queries.
    position_ids [S] int64: of the row's tokens, of which `query_rows` [N] and `key_rows` [Q] int64 are the queries and
    the keys (None: all). longest: tokens of the longest text, from the first key that a query sees to that query.
    """

    causal: bool
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    query_bounds: Tensor
    key_bounds: Tensor
    position_ids: Tensor
    query_rows: Tensor | None
    key_rows: Tensor | None
    longest: int

    @property
    def query_positions(self) -> Tensor:
        """Position of each query in its text, [N] int64."""
        return self.position_ids if self.query_rows is None else self.position_ids[self.query_rows]

    @property
    def key_positions(self) -> Tensor:
        """Position of each key in its text, [Q] int64."""
        return self.position_ids if self.key_rows is None else self.position_ids[self.key_rows]


def segment_pass(layout: GroupLayout) -> AttentionPass:
    """The first pass over a packed row: every segment (prompt, candidate, padding) causally over itself."""
    lengths, bounds = layout.segment_lengths, layout.segment_cu_seqlens
    return AttentionPass(True, lengths, lengths, bounds, bounds, layout.position_ids, None, None, max(lengths))


def prompt_pass(layout: GroupLayout) -> AttentionPass:
    """The second pass: the responses of each group, one block of queries, over their prompt."""
    return AttentionPass(
        causal=False,
        query_lengths=tuple(group.response_total for group in layout.groups),
        key_lengths=tuple(group.prompt_length for group in layout.groups),
        query_bounds=layout.response_cu_seqlens,
        key_bounds=layout.prompt_cu_seqlens,
        position_ids=layout.position_ids,
        query_rows=layout.response_rows,
        key_rows=layout.prompt_rows,
        longest=max(group.prompt_length + max(group.response_lengths, default=0) for group in layout.groups),
    )
