"""The layout of candidate groups in one packed micro-batch.

A micro-batch is ``[prompt | y_1 | ... | y_K]`` for each group, groups one after another, then
padding to a multiple that tensor parallelism needs. Every candidate sees its prompt and itself,
nothing else; its positions continue the prompt's.

Attention is two passes. First: causal inside every segment (each prompt, each candidate, the
padding). Second: every candidate token over its whole prompt, not causal. The softmax of a
candidate token over the union of both key sets is the merge of the two results by their
log-sum-exps.

With a window that cuts texts it is one pass where the kernels can do that: a candidate's keys are
the end of its prompt, as far as its first token sees it, and its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from exo_megatron.models.attention.kernels import attend, takes_window
from exo_megatron.models.attention.passes import AttentionPass, ScoreRule
from exo_megatron.parallel.upload import to_device


@dataclass(frozen=True)
class GroupSpan:
    """The place of one group: index of its first prompt token, P, and R_1..R_K.

    y_1 starts at start + P.
    """

    start: int
    prompt_length: int
    candidate_lengths: tuple[int, ...]

    @property
    def candidates_start(self) -> int:
        """Index of the first token of y_1."""
        return self.start + self.prompt_length

    @property
    def candidates_total(self) -> int:
        """Number of candidate tokens, R_1 + ... + R_K."""
        return sum(self.candidate_lengths)


@dataclass(frozen=True)
class GroupLayout:
    """Index tensors of a micro-batch of S tokens, G groups, C candidates, N candidate tokens.

    M tokens predict candidate tokens; the last prompt token predicts the first token of all K
    candidates. Candidate tokens are numbered in the order of the tokens that predict them. Padding
    has token 0 and positions 0, 1, 2, ...

    Attributes:
        groups: place of each group.
        num_tokens: S.
        input_ids, position_ids: [S] int64.
        segment_lengths: tokens of the causal segments of the first attention pass, which cover the
            micro-batch in order: each prompt, each candidate, the padding.
        segment_cu_seqlens: [segments + 1] int32, their cumulative lengths.
        candidate_index, prompt_index: [N] and [sum P] int64, the queries and the keys of the second
            pass.
        candidates_cu_seqlens, prompts_cu_seqlens: [G + 1] int32, cumulative lengths that delimit
            these per group.
        predict_index: [M] int64, increasing, the tokens whose hidden state predicts some candidate
            token.
        token_predictor: [N] int64, non-decreasing index into predict_index.
        token_target: [N] int64, id of candidate token n.
        token_candidate: [N] int64, its candidate 0..C-1.
        token_order: [N] int64, its place in natural order: candidate after candidate, first token
            to last.
        candidate_lengths, last_index: [C] int64, length and last token of each candidate.
        group_sizes: K of each group.
        windowed: the passes with a window made so far, by the window.
    """

    groups: tuple[GroupSpan, ...]
    num_tokens: int
    input_ids: Tensor
    position_ids: Tensor
    segment_lengths: tuple[int, ...]
    segment_cu_seqlens: Tensor
    candidate_index: Tensor
    prompt_index: Tensor
    candidates_cu_seqlens: Tensor
    prompts_cu_seqlens: Tensor
    predict_index: Tensor
    token_predictor: Tensor
    token_target: Tensor
    token_candidate: Tensor
    token_order: Tensor
    candidate_lengths: Tensor
    last_index: Tensor
    group_sizes: tuple[int, ...]
    qkv_format: str = "candidate_groups"
    windowed: dict[int, AttentionPass] = field(default_factory=dict, init=False, compare=False)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, layer_number: int, rule: ScoreRule) -> Tensor:
        """See Layout."""
        if rule.window is not None and self.longest > rule.window and takes_window(query, rule):
            return attend(query, key, value, (self.windowed_pass(rule.window),), rule)
        return attend(query, key, value, self.passes(), rule)

    def predicting(self, hidden: Tensor) -> Tensor:
        """See Layout."""
        return hidden[self.predict_index, 0]

    def candidate_ends(self, hidden: Tensor) -> Tensor:
        """See Layout."""
        return hidden[self.last_index, 0]

    @property
    def longest(self) -> int:
        """Tokens of the longest text: a prompt with a candidate, or padding."""
        texts = (group.prompt_length + max(group.candidate_lengths, default=0) for group in self.groups)
        return max((*texts, *self.segment_lengths))

    def passes(self) -> tuple[AttentionPass, ...]:
        """Describe the attention passes: the first, and the second if there are candidates."""
        if not self.candidate_index.shape[0]:
            return (self.segment_pass(),)
        return self.segment_pass(), self._prompt_pass()

    def segment_pass(self) -> AttentionPass:
        """Describe the first pass: every prompt, candidate and padding causally over itself."""
        lengths, bounds, positions = self.segment_lengths, self.segment_cu_seqlens, self.position_ids
        starts = tuple(accumulate(lengths[:-1], initial=0))
        return AttentionPass(
            causal=True,
            query_lengths=lengths,
            key_lengths=lengths,
            query_starts=starts,
            key_starts=starts,
            query_index=None,
            key_index=None,
            query_bounds=bounds,
            key_bounds=bounds,
            query_positions=positions,
            key_positions=positions,
            longest=max(lengths),
        )

    def _prompt_pass(self) -> AttentionPass:
        """Describe the second pass: each group's candidates, one block, over their prompt."""
        return AttentionPass(
            causal=False,
            query_lengths=tuple(group.candidates_total for group in self.groups),
            key_lengths=tuple(group.prompt_length for group in self.groups),
            query_starts=tuple(group.candidates_start for group in self.groups),
            key_starts=tuple(group.start for group in self.groups),
            query_index=self.candidate_index,
            key_index=self.prompt_index,
            query_bounds=self.candidates_cu_seqlens,
            key_bounds=self.prompts_cu_seqlens,
            query_positions=self.position_ids,
            key_positions=self.position_ids,
            longest=max(group.prompt_length + max(group.candidate_lengths, default=0) for group in self.groups),
        )

    def windowed_pass(self, window: int) -> AttentionPass:
        """Describe the one pass with a window. Layers with equal windows share it.

        Its index tensors are made on the device, of those that are there.
        """
        if window not in self.windowed:
            before = [0] * len(self.segment_lengths)
            segment = 0
            for group in self.groups:
                for _ in group.candidate_lengths:
                    segment += 1
                    before[segment] = min(group.prompt_length, window - 1)
                segment += 1
            lengths = tuple(own + seen for own, seen in zip(self.segment_lengths, before, strict=True))
            key_bounds, key_index = self._windowed_keys(window, sum(lengths))
            self.windowed[window] = replace(
                self.segment_pass(),
                key_lengths=lengths,
                query_starts=(),
                key_starts=(),
                key_index=key_index,
                key_bounds=key_bounds,
                longest=self.longest,
            )
        return self.windowed[window]

    def _windowed_keys(self, window: int, count: int) -> tuple[Tensor, Tensor]:
        """Compute bounds [segments + 1] int32 and tokens [count] int64 of the keys of `windowed_pass`."""
        starts = self.segment_cu_seqlens[:-1].long()
        position = self.position_ids[starts]  # of a segment's first token: 0, or its prompt's length
        before = position.clamp(max=window - 1)
        ends = torch.where(position == 0, starts, 0).cummax(0).values + position  # of the segments' prompts
        bounds = functional.pad((self.segment_cu_seqlens.diff() + before).cumsum(0), (1, 0))
        key = torch.arange(count, device=starts.device)
        segment = torch.searchsorted(bounds, key, right=True) - 1
        place = key - (bounds[:-1] + before)[segment]  # in the segment; below 0 in the prompt
        return bounds.int(), place + torch.where(place < 0, ends[segment], starts[segment])

    def to(self, device: torch.device) -> GroupLayout:
        """Copy the layout to `device`, without waiting for it."""
        return to_device(self, device)


def build_layout(
    prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[Sequence[int]]], *, multiple: int = 1
) -> GroupLayout:
    """Lay out groups in one micro-batch.

    G = 0 gives padding only, which predicts nothing: the share of a data-parallel rank that has no
    group in this step.

    Args:
        prompts: G lists of P >= 1 token ids.
        candidates: for each group its lists of R_k >= 1 ids; none for a prompt without candidates.
        multiple: the micro-batch is padded to a multiple of this many tokens (the tensor-parallel
            size under sequence parallelism).
    """
    ids: list[int] = []
    positions: list[int] = []
    groups: list[GroupSpan] = []
    segments: list[int] = []
    predict_index: list[int] = []
    tokens: list[tuple[int, int, int, int]] = []  # predictor, target, candidate, natural order
    candidate_lengths: list[int] = []
    last_index: list[int] = []
    for prompt, ys in zip(prompts, candidates, strict=True):
        groups.append(GroupSpan(len(ids), len(prompt), tuple(len(y) for y in ys)))
        ids.extend(prompt)
        positions.extend(range(len(prompt)))
        segments.append(len(prompt))
        shared = len(predict_index)
        predict_index.append(len(ids) - 1)
        for y in ys:
            natural = sum(candidate_lengths)
            candidate = len(candidate_lengths)
            tokens.append((shared, y[0], candidate, natural))
            for t in range(1, len(y)):
                tokens.append((len(predict_index), y[t], candidate, natural + t))
                predict_index.append(len(ids) + t - 1)
            ids.extend(y)
            last_index.append(len(ids) - 1)
            positions.extend(range(len(prompt), len(prompt) + len(y)))
            segments.append(len(y))
            candidate_lengths.append(len(y))
    padding = -len(ids) % multiple if ids else multiple
    if padding:
        ids.extend([0] * padding)
        positions.extend(range(padding))
        segments.append(padding)
    tokens.sort(key=lambda token: token[0])  # stable: the K first tokens of a group keep their order
    predictors, targets, of_candidates, order = (tuple(token[i] for token in tokens) for i in range(4))
    return GroupLayout(
        groups=tuple(groups),
        num_tokens=len(ids),
        input_ids=_int64(ids),
        position_ids=_int64(positions),
        segment_lengths=tuple(segments),
        segment_cu_seqlens=_cu_seqlens(segments),
        candidate_index=_int64([g.candidates_start + i for g in groups for i in range(g.candidates_total)]),
        prompt_index=_int64([g.start + i for g in groups for i in range(g.prompt_length)]),
        candidates_cu_seqlens=_cu_seqlens([g.candidates_total for g in groups]),
        prompts_cu_seqlens=_cu_seqlens([g.prompt_length for g in groups]),
        predict_index=_int64(predict_index),
        token_predictor=_int64(predictors),
        token_target=_int64(targets),
        token_candidate=_int64(of_candidates),
        token_order=_int64(order),
        candidate_lengths=_int64(candidate_lengths),
        last_index=_int64(last_index),
        group_sizes=tuple(len(g.candidate_lengths) for g in groups),
    )


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _cu_seqlens(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
