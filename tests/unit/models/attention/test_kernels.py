"""Core attention over candidate groups, against softmax(q k^T) under a dense mask, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from exo_megatron.models.attention.dense import PlainKernel
from exo_megatron.models.attention.kernels import BatchedKernels
from exo_megatron.models.attention.passes import QKV, Attended, ScoreRule
from exo_megatron.models.layouts.groups import GroupLayout, build_layout

RULE = ScoreRule(scale=0.37)  # not 1/sqrt(d), so that an ignored scale is seen

RAGGED = ([(5, (3, 7, 1, 3)), (1, (4,)), (9, (2, 2, 6)), (2, (1, 1))], 8)
LAYOUTS = {
    "ragged groups and padding": RAGGED,
    "one group of one": ([(3, (2,))], 1),
    "one-token prompt and candidates": ([(1, (1, 1))], 1),
    "equal lengths, no padding": ([(4, (4, 4)), (4, (4, 4))], 4),
    "padding only": ([], 4),
}


def group_attention(query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, rule: ScoreRule) -> Tensor:
    """Attend as a layer of the model does."""
    return layout.attend(query, key, value, layer_number=1, rule=rule)


def make_layout(groups: list[tuple[int, tuple[int, ...]]], multiple: int) -> GroupLayout:
    return build_layout([[7] * p for p, _ in groups], [[[8] * r for r in rs] for _, rs in groups], multiple=multiple)


def visible(groups: list[tuple[int, tuple[int, ...]]], num_tokens: int) -> Tensor:
    """[S, S] which key each query sees, from the definition: its own segment up to itself, and its own prompt."""
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)

    def causal(start: int, length: int) -> None:
        mask[start : start + length, start : start + length] = torch.ones(length, length, dtype=torch.bool).tril()

    start = 0
    for prompt, candidates in groups:
        causal(start, prompt)
        first = start + prompt
        for candidate in candidates:
            causal(first, candidate)
            mask[first : first + candidate, start : start + prompt] = True
            first += candidate
        start = first
    causal(start, num_tokens - start)
    return mask


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rule: ScoreRule) -> Tensor:
    """[S, hq, d] softmax attention with each key/value head repeated for its consecutive query heads."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def random_qkv(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens + heads)
    tensors = [
        torch.randn(tokens, h, 16, generator=generator, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)
    ]
    return [tensor.to(device, dtype).requires_grad_() for tensor in tensors]


def in_window(layout: GroupLayout, window: int | None) -> Tensor:
    """[S, S] whether the key's position is one of the `window` last ones up to the query's."""
    positions = layout.position_ids.cpu()
    return positions[:, None] - positions < (window or layout.num_tokens)


def compare(
    groups: list[tuple[int, tuple[int, ...]]],
    layout: GroupLayout,
    qkv: list[Tensor],
    tolerance: float,
    rule: ScoreRule = RULE,
) -> None:
    """Output and the gradients of q, k, v for a random upstream gradient; error relative to the largest entry."""
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in qkv]
    mask = visible(groups, layout.num_tokens) & in_window(layout, rule.window)
    expected = dense_attention(*exact, mask, rule)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected.backward(upstream)
    output = group_attention(*qkv, layout, rule)
    output.backward(upstream.to(output.device, output.dtype))
    pairs = {"output": (output, expected)}
    pairs |= {name: (ours.grad, theirs.grad) for name, ours, theirs in zip("qkv", qkv, exact, strict=True)}
    for name, (ours, theirs) in pairs.items():
        error = (ours.detach().double().cpu() - theirs.detach()).abs().max() / theirs.detach().abs().max()
        assert error < tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_against_dense_mask(name: str, heads: int, kv_heads: int, dtype: torch.dtype, tolerance: float) -> None:
    groups, multiple = LAYOUTS[name]
    layout = make_layout(groups, multiple)
    compare(groups, layout, random_qkv(layout.num_tokens, heads, kv_heads, dtype), tolerance)


def test_bf16_stays_within_its_rounding() -> None:
    layout = make_layout(*RAGGED)
    compare(RAGGED[0], layout, random_qkv(layout.num_tokens, 4, 2, torch.bfloat16), 2e-2)


def test_long_segments_cross_the_kernels_blocks() -> None:
    """Segments longer than the flash kernel's query and key blocks (32 to 512 positions)."""
    groups = [(530, (45, 300)), (33, (513,))]
    layout = make_layout(groups, 1)
    compare(groups, layout, random_qkv(layout.num_tokens, 2, 1, torch.float64), 1e-12)


def test_large_scores_do_not_overflow() -> None:
    """Scores of several hundred: only the log-sum-exp form survives."""
    layout = make_layout(*RAGGED)
    query, key, value = random_qkv(layout.num_tokens, 4, 2, torch.float64)
    big = [(query.detach() * 20).requires_grad_(), (key.detach() * 20).requires_grad_(), value]
    compare(RAGGED[0], layout, big, 1e-11)


def test_inputs_are_not_modified() -> None:
    layout = make_layout(*RAGGED)
    qkv = random_qkv(layout.num_tokens, 4, 2, torch.float32)
    before = [tensor.detach().clone() for tensor in qkv]
    upstream = torch.ones(layout.num_tokens, 4, 16)
    group_attention(*qkv, layout, RULE).backward(upstream)
    assert all(torch.equal(tensor, old) for tensor, old in zip(qkv, before, strict=True))
    assert torch.equal(upstream, torch.ones_like(upstream))


def test_other_groups_and_candidates_do_not_leak() -> None:
    """Changing one candidate changes no other token, neither output nor gradient, bit for bit."""
    groups, multiple = RAGGED
    layout = make_layout(groups, multiple)
    qkv = random_qkv(layout.num_tokens, 4, 2, torch.float32)
    changed = [tensor.detach().clone() for tensor in qkv]
    tokens = slice(8, 15)  # the second candidate of the first group: prompt 0..4, y_1 5..7, y_2 8..14
    for tensor in changed:
        tensor[tokens] += 1.0
    before = group_attention(*qkv, layout, RULE)
    after = group_attention(*changed, layout, RULE)
    others = torch.ones(layout.num_tokens, dtype=torch.bool)
    others[tokens] = False
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[tokens], after[tokens])


def test_plain_kernels_equal_the_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix-product kernels that fp32 uses on CUDA."""
    kernels = BatchedKernels(PlainKernel())
    monkeypatch.setattr("exo_megatron.models.attention.kernels.kernels_for", lambda query, pass_, rule: kernels)
    layout = make_layout(*RAGGED)
    compare(RAGGED[0], layout, random_qkv(layout.num_tokens, 6, 2, torch.float64), 1e-13)


class CountingKernel(PlainKernel):
    """Notes the shape of the queries of every call, [blocks, heads, length, d]."""

    def __init__(self) -> None:
        self.queries: list[Tensor] = []

    def forward(self, inputs: QKV, *others: Any) -> Attended:
        self.queries.append(inputs.query)
        return super().forward(inputs, *others)


@pytest.mark.parametrize(
    ("groups", "calls"),
    [
        # Prompt and candidates of one length, and those of the next group behind them: one call a pass.
        ([(4, (4, 4)), (4, (4, 4))], [(6, 4), (2, 8)]),
        # Segments of other lengths lie between those of equal length: a call for each.
        ([(3, (2,)), (3, (2,))], [(1, 3), (1, 2), (1, 3), (1, 2), (2, 2)]),
        # Equal lengths, but not at equal distances.
        ([(2, (2, 2)), (2, (1, 3)), (2, (2, 2))], [(4, 2), (1, 1), (1, 3), (3, 2), (3, 4)]),
        ([(2, (4,)), (2, (1, 3)), (1, (4,))], [(1, 2), (1, 4), (1, 2), (1, 1), (1, 3), (1, 1), (1, 4), (2, 4), (1, 4)]),
    ],
)
def test_blocks_of_a_run_share_a_call_and_are_read_in_place(
    groups: list[tuple[int, tuple[int, ...]]], calls: list[tuple[int, int]]
) -> None:
    layout = make_layout(groups, 1)
    inputs = QKV(*(tensor.detach() for tensor in random_qkv(layout.num_tokens, 4, 2, torch.float64)))
    kernel = CountingKernel()
    first, second = layout.passes()
    attended = BatchedKernels(kernel).forward(inputs, first, RULE)
    BatchedKernels(kernel).merge(attended, inputs, second, RULE)
    assert [(each.shape[0], each.shape[2]) for each in kernel.queries] == calls
    storage = inputs.query.untyped_storage().data_ptr()
    assert {each.untyped_storage().data_ptr() for each in kernel.queries} == {storage}
    mask = visible(groups, layout.num_tokens)
    torch.testing.assert_close(attended.output, dense_attention(*inputs, mask, RULE), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    ("window", "softcap"),
    [(2, None), (4, None), (9, None), (10, None), (11, None), (50, None), (None, 1.5), (3, 1.5)],
)
def test_windows_and_soft_caps(name: str, window: int | None, softcap: float | None) -> None:
    """Windows that end inside a candidate, inside its prompt, between them, and beyond: RAGGED's texts have 6 to 15."""
    groups, multiple = LAYOUTS[name]
    layout = make_layout(groups, multiple)
    rule = ScoreRule(0.37, softcap, window)
    compare(groups, layout, random_qkv(layout.num_tokens, 6, 2, torch.float64), 1e-13, rule)


@pytest.mark.parametrize("piece", [1, 200, 900])
@pytest.mark.parametrize("window", [None, 1000, 3, 9])
def test_any_size_of_pieces(piece: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries one at a time, a few at a time, and windows that begin inside a piece."""
    monkeypatch.setattr("exo_megatron.models.attention.dense.PIECE", piece)
    groups = [(30, (3, 45, 3)), (1, (40,))]
    layout = make_layout(groups, 8)
    rule = ScoreRule(0.37, 1.5, window)
    compare(groups, layout, random_qkv(layout.num_tokens, 4, 2, torch.float64), 1e-13, rule)


def test_windows_in_bf16() -> None:
    """Scores and their sums are not rounded to bf16."""
    layout = make_layout(*RAGGED)
    rule = ScoreRule(0.37, 5.0, 4)
    compare(RAGGED[0], layout, random_qkv(layout.num_tokens, 4, 2, torch.bfloat16), 2e-2, rule)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 5e-6)])
def test_cuda_against_dense_mask(name: str, dtype: torch.dtype, tolerance: float) -> None:
    groups, multiple = LAYOUTS[name]
    layout = make_layout(groups, multiple).to(torch.device("cuda"))
    compare(groups, layout, random_qkv(layout.num_tokens, 4, 2, dtype, "cuda"), tolerance)
