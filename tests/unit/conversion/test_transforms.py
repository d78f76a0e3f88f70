"""Transforms move elements to where megatron-core looks for them, and back."""

from __future__ import annotations

import pytest
import torch

from exo_megatron.conversion.transforms import (
    Transform,
    check_one_dtype,
    fused_qkv,
    grouped_qkv,
    padded_rows,
    same,
    stacked_rows,
    transposed,
)
from exo_megatron.errors import CheckpointError


def test_qkv_rows_by_group() -> None:
    """4 query heads, 2 key/value heads of size 1: [q0 q1 k0 v0 | q2 q3 k1 v1]."""
    query, key, value = torch.tensor([[0], [1], [2], [3]]), torch.tensor([[10], [11]]), torch.tensor([[20], [21]])
    joined = grouped_qkv(4, 2, 1).join([query, key, value])
    assert joined.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_qkv_keeps_the_order_within_a_head() -> None:
    query, key, value = torch.arange(8), torch.arange(100, 104), torch.arange(200, 204)
    joined = grouped_qkv(4, 2, 2).join([query, key, value])
    assert joined.tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]


def test_fused_qkv_is_regrouped() -> None:
    """All query heads, all key heads, all value heads -> the order by group."""
    fused = torch.tensor([0, 1, 2, 3, 10, 11, 20, 21])
    assert fused_qkv(4, 2, 1).join([fused]).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_transposed_columns_are_rows() -> None:
    """[inputs, outputs] = [2, 4]: query, query, key, value columns of one group."""
    fused = torch.tensor([[0, 1, 10, 20], [5, 6, 15, 25]])
    assert transposed(fused_qkv(2, 1, 1)).join([fused]).tolist() == [[0, 5], [1, 6], [10, 15], [20, 25]]


@pytest.mark.parametrize(
    ("transform", "shapes"),
    [
        (same(), [(3, 4)]),
        (stacked_rows(3, 5), [(3, 4), (5, 4)]),
        (stacked_rows(3, 5), [(3,), (5,)]),
        (padded_rows(5, 8), [(5, 4)]),
        (grouped_qkv(6, 2, 4), [(24, 7), (8, 7), (8, 7)]),
        (grouped_qkv(3, 1, 2), [(6,), (2,), (2,)]),
        (fused_qkv(6, 2, 4), [(40, 7)]),
        (fused_qkv(3, 1, 2), [(10,)]),
        (transposed(fused_qkv(6, 2, 4)), [(7, 40)]),
        (transposed(same()), [(3, 5)]),
        (transposed(stacked_rows(3, 5)), [(2, 3), (2, 5)]),
    ],
)
def test_split_undoes_join(transform: Transform, shapes: list[tuple[int, ...]]) -> None:
    parts = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    back = transform.split(transform.join(parts))
    assert len(back) == len(parts)
    for part, again in zip(parts, back, strict=True):
        assert torch.equal(part, again)


def test_padding_is_zero_and_dropped_whatever_it_became() -> None:
    transform = padded_rows(2, 4)
    padded = transform.join([torch.ones(2, 3)])
    assert padded.tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 2
    padded[2:] = 7.0
    assert transform.split(padded)[0].tolist() == [[1.0] * 3] * 2


def test_mixed_types() -> None:
    assert check_one_dtype("hf", {"a": torch.float32, "b": torch.float32}) == torch.float32
    with pytest.raises(CheckpointError, match=r"hf: a is torch.float32 but c is torch.bfloat16.*--dtype"):
        check_one_dtype("hf", {"a": torch.float32, "b": torch.float32, "c": torch.bfloat16})
