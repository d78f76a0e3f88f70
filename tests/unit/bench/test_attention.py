"""The comparison of attentions: that it runs, and that it sees a side whose gradients are wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exo_megatron.models.attention.passes import ScoreRule
from exo_megatron.models.layouts.groups import GroupLayout
from tools.bench import attention
from tools.bench.attention import DENSE, OURS, SEPARATE, Case, make_sides, segments, separate_sequences, visible
from tools.bench.options import Options
from tools.bench.sides import Different

QUICK = Options(quick=True, rounds=1, pictures=Path("unused"))
CPU = torch.device("cpu")
CASE = Case(prompt=3, length=2, candidates=2, groups=2)


def test_quick_run_compares_all_sides() -> None:
    table = attention.run(QUICK)
    assert [row[:2] for row in table.rows] == [("12, 20, 4", "8/8"), ("40, 5, 3 x2", "8/2")]
    for row in table.rows:
        assert len(row) == len(table.columns)
        assert 0 < float(row[-1]) < 1e-5
        assert torch.cuda.is_available() or "no backward on CPU" in row


def test_ours_without_the_prompt_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that does not see its prompt: only the segments' own pass."""

    def only_segments(query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, rule: ScoreRule) -> Tensor:
        output = torch.zeros_like(query)
        for start, length in zip(layout.segment_cu_seqlens.tolist(), layout.segment_lengths, strict=False):
            rows = slice(start, start + length)
            heads = (tensor[rows].transpose(0, 1)[None] for tensor in (query, key, value))
            part = attention.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True, scale=rule.scale)
            output[rows] = part[0].transpose(0, 1)
        return output

    monkeypatch.setattr(attention, "group_attention", only_segments)
    with pytest.raises(Different, match="relative difference"):
        attention.run(QUICK)


def test_prompt_gradients_that_are_not_summed_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def last_copy(gradient: Tensor, *, copies: Tensor, length: int) -> Tensor:
        packed = gradient.new_zeros(length, *gradient.shape[2:])
        packed[copies.flatten()] = gradient.flatten(0, 1)
        return packed

    monkeypatch.setattr(attention, "_summed", last_copy)
    with pytest.raises(Different, match=SEPARATE):
        attention.run(QUICK)


def test_a_mask_that_shows_too_much_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def causal(case: Case, device: torch.device) -> Tensor:
        return torch.ones(case.num_tokens, case.num_tokens, dtype=torch.bool, device=device).tril()

    monkeypatch.setattr(attention, "visible", causal)
    with pytest.raises(Different, match=DENSE):
        attention.run(QUICK)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
@pytest.mark.parametrize("key_heads", [8, 2])
def test_flex_sees_what_the_mask_shows(monkeypatch: pytest.MonkeyPatch, key_heads: int) -> None:
    """Its forward, not compiled: all of FlexAttention that runs on every CPU."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = replace(CASE, key_heads=key_heads)
    dense = make_sides(case, CPU, torch.float32)[DENSE]
    flex = attention.flex_side(case, tuple(tensor[0] for tensor in dense.inputs), dense.output_gradient[0])
    inputs = (tensor.detach() for tensor in flex.inputs)  # it has no backward on the CPU, and says so
    torch.testing.assert_close(flex.attend(*inputs), dense.forward().detach(), rtol=0, atol=1e-5)


def test_mask_and_segments_by_hand() -> None:
    """Two groups of [p p p | a a | b b]."""
    group, segment = segments(CASE, CPU)
    assert group.tolist() == [0] * 7 + [1] * 7
    assert segment.tolist() == [0, 0, 0, 1, 1, 2, 2, 0, 0, 0, 3, 3, 4, 4]
    seen = [
        "1......",
        "11.....",
        "111....",
        "1111...",
        "11111..",
        "111..1.",
        "111..11",
    ]
    rows = ["".join("1" if each else "." for each in row) for row in visible(CASE, CPU).tolist()]
    assert rows == [line + "." * 7 for line in seen] + ["." * 7 + line for line in seen]


def test_separate_sequences_by_hand() -> None:
    assert separate_sequences(CASE, CPU).tolist() == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 5, 6],
        [7, 8, 9, 10, 11],
        [7, 8, 9, 12, 13],
    ]


def test_pairs_by_hand() -> None:
    assert CASE.pairs(OURS) == 2 * (4.5 + 2 * 2 * 4)
    assert CASE.pairs(SEPARATE) == 4 * 12.5
    assert CASE.pairs(DENSE) == 14 * 14


def test_memory_counts_inputs_and_mask() -> None:
    sides = make_sides(CASE, CPU, torch.float32)
    row = 14 * 8 * 64 * 4
    assert sides[DENSE].memory() >= 8 * row + 14 * 14  # inputs, gradient, output, gradients; the mask
