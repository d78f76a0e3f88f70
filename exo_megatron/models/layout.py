"""How the candidate groups of one micro-batch lie in their packed row.

A row is ``[prompt | y_1 | ... | y_K]`` for each group, groups one after another, then padding to a multiple that
tensor parallelism needs. Every candidate sees its prompt and itself, nothing else; its positions continue the
prompt's. The layout travels through megatron-core's forward pass as `packed_seq_params`, so that every micro-batch
in flight and every recomputation has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupSpan:
    """Where one group lies: row index of its first prompt token, P, and R_1..R_K. y_1 starts at start + P."""

    start: int
    prompt_length: int
    response_lengths: tuple[int, ...]

    @property
    def response_start(self) -> int:
        """Row index of the first token of y_1."""
        return self.start + self.prompt_length

    @property
    def response_total(self) -> int:
        """R_1 + ... + R_K."""
        return sum(self.response_lengths)


@dataclass(frozen=True)
class GroupLayout:
    """Index tensors of one packed row of S tokens with G groups, C candidates, N response tokens, M predicting rows.

    input_ids, position_ids: [S] int64. Padding has token 0, positions 0, 1, 2, ...

    Attention, for variable-length kernels (int32): `segment_cu_seqlens` [2nd pass excluded: G + C (+1 if padded) + 1]
    delimits the causal segments, which cover the row in order: each prompt, each candidate, the padding.
    `response_rows` [N] and `prompt_rows` [sum P] int64 select the queries and the keys of the second pass, delimited
    per group by `response_cu_seqlens` and `prompt_cu_seqlens` [G + 1].

    Prediction: `predict_rows` [M] int64, increasing, are the rows whose hidden state predicts some response token
    (the last prompt row serves the first token of all K candidates). Response token n, counted in row order of the
    row that predicts it, has `token_row[n]` (index into predict_rows, non-decreasing), `token_target[n]` (id) and
    `token_candidate[n]` (0..C-1). `token_order[n]` is its place in natural order: candidate after candidate, first
    token to last. `candidate_lengths` [C] int64; `last_rows` [C] int64 are the rows of the candidates' last tokens;
    `group_sizes` are the K of each group.
    """

    groups: tuple[GroupSpan, ...]
    row_length: int
    input_ids: Tensor
    position_ids: Tensor
    segment_lengths: tuple[int, ...]
    segment_cu_seqlens: Tensor
    response_rows: Tensor
    prompt_rows: Tensor
    response_cu_seqlens: Tensor
    prompt_cu_seqlens: Tensor
    predict_rows: Tensor
    token_row: Tensor
    token_target: Tensor
    token_candidate: Tensor
    token_order: Tensor
    candidate_lengths: Tensor
    last_rows: Tensor
    group_sizes: tuple[int, ...]
    # What megatron-core reads from packed_seq_params; any format but "thd" passes through to core attention.
    qkv_format: str = "candidate_groups"
    cp_group: None = None

    @property
    def max_seqlen_q(self) -> int:
        """Longest causal segment."""
        return max(self.segment_lengths)

    @property
    def max_seqlen_kv(self) -> int:
        """Longest causal segment (prompts are segments, so this bounds the second pass too)."""
        return max(self.segment_lengths)

    @property
    def num_candidates(self) -> int:
        """C, over all groups of the row."""
        return sum(self.group_sizes)

    def to(self, device: torch.device) -> GroupLayout:
        """The same layout with its tensors on `device`."""
        values: dict[str, Any] = {field.name: vars(self)[field.name] for field in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        return GroupLayout(**moved)


def build_layout(
    prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[Sequence[int]]], *, multiple: int = 1
) -> GroupLayout:
    """Lay out groups in one row.

    prompts: G lists of P >= 1 token ids. candidates: for each group its K >= 1 lists of R_k >= 1 ids.
    multiple: the row is padded to a multiple of this (TP size under sequence parallelism). G = 0 gives a row of
    padding only, which predicts nothing: the share of a data-parallel rank that has no group in this step.
    """
    ids: list[int] = []
    positions: list[int] = []
    groups: list[GroupSpan] = []
    segments: list[int] = []
    predict_rows: list[int] = []
    tokens: list[tuple[int, int, int, int]] = []  # predicting row (index), target, candidate, natural order
    candidate_lengths: list[int] = []
    last_rows: list[int] = []
    for prompt, responses in zip(prompts, candidates, strict=True):
        groups.append(GroupSpan(len(ids), len(prompt), tuple(len(response) for response in responses)))
        ids.extend(prompt)
        positions.extend(range(len(prompt)))
        segments.append(len(prompt))
        shared_row = len(predict_rows)
        predict_rows.append(len(ids) - 1)
        for response in responses:
            natural = sum(candidate_lengths)
            candidate = len(candidate_lengths)
            tokens.append((shared_row, response[0], candidate, natural))
            for t in range(1, len(response)):
                tokens.append((len(predict_rows), response[t], candidate, natural + t))
                predict_rows.append(len(ids) + t - 1)
            ids.extend(response)
            last_rows.append(len(ids) - 1)
            positions.extend(range(len(prompt), len(prompt) + len(response)))
            segments.append(len(response))
            candidate_lengths.append(len(response))
    padding = -len(ids) % multiple if ids else multiple
    if padding:
        ids.extend([0] * padding)
        positions.extend(range(padding))
        segments.append(padding)
    tokens.sort(key=lambda token: token[0])  # stable: the K first tokens of a group keep their order

    def int64(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    def cu_seqlens(lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

    return GroupLayout(
        groups=tuple(groups),
        row_length=len(ids),
        input_ids=int64(ids),
        position_ids=int64(positions),
        segment_lengths=tuple(segments),
        segment_cu_seqlens=cu_seqlens(segments),
        response_rows=int64([g.response_start + i for g in groups for i in range(g.response_total)]),
        prompt_rows=int64([g.start + i for g in groups for i in range(g.prompt_length)]),
        response_cu_seqlens=cu_seqlens([g.response_total for g in groups]),
        prompt_cu_seqlens=cu_seqlens([g.prompt_length for g in groups]),
        predict_rows=int64(predict_rows),
        token_row=int64([token[0] for token in tokens]),
        token_target=int64([token[1] for token in tokens]),
        token_candidate=int64([token[2] for token in tokens]),
        token_order=int64([token[3] for token in tokens]),
        candidate_lengths=int64(candidate_lengths),
        last_rows=int64(last_rows),
        group_sizes=tuple(len(g.response_lengths) for g in groups),
    )
