"""Conversions between one megatron-core tensor and the HF tensors of which it is made.

They are exact, because they only move elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exo_megatron.errors import CheckpointError


@dataclass(frozen=True)
class Transform:
    """A pair of functions: `split(join(tensors))` equals `tensors`, bit for bit."""

    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


def same() -> Transform:
    """Return the transform of one tensor that stays as it is."""
    return Transform(join=lambda parts: parts[0], split=lambda whole: (whole,))


def stacked_rows(*rows: int) -> Transform:
    """Return the transform that stacks tensors of `rows[i]` rows, one below the other.

    Gate and up projections in one linear are an example.
    """
    return Transform(join=lambda parts: torch.cat(list(parts)), split=lambda whole: whole.split(list(rows)))


def padded_rows(rows: int, padded: int) -> Transform:
    """Return the transform of [rows, ...] to [padded, ...], with zeros below.

    Splitting drops the padding, whatever its values are.
    """

    def join(parts: Sequence[Tensor]) -> Tensor:
        (part,) = parts
        if padded == rows:
            return part
        return torch.cat([part, part.new_zeros(padded - rows, *part.shape[1:])])

    return Transform(join=join, split=lambda whole: (whole[:rows],))


def grouped_qkv(heads: int, kv_heads: int, head_dim: int) -> Transform:
    """Return the transform of q, k and v to megatron-core's order of rows.

    q is [heads*d, ...], k and v are [kv_heads*d, ...]. The order is, for each key/value head: its
    query heads, its key head, its value head. A division of the rows into t equal parts then gives
    each tensor-parallel rank whole groups, for any t that divides `kv_heads`.
    """
    per_group = heads // kv_heads * head_dim

    def join(parts: Sequence[Tensor]) -> Tensor:
        grouped = [part.reshape(kv_heads, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(whole: Tensor) -> Sequence[Tensor]:
        grouped = whole.reshape(kv_heads, -1, *whole.shape[1:])
        return tuple(part.flatten(0, 1) for part in grouped.split([per_group, head_dim, head_dim], dim=1))

    return Transform(join=join, split=split)


def regrouped(hf: Transform, ours: Transform) -> Transform:
    """Return the transform of one HF tensor that fuses the parts of `ours`.

    `hf` makes that tensor of the same parts, in the same order.
    """
    return Transform(
        join=lambda parts: ours.join(hf.split(parts[0])), split=lambda whole: (hf.join(ours.split(whole)),)
    )


def transposed(how: Transform) -> Transform:
    """Return `how` for HF matrices that are stored as [inputs, outputs]."""
    return Transform(
        join=lambda parts: how.join([part.t() for part in parts]),
        split=lambda whole: [part.t() for part in how.split(whole)],
    )


def fused_qkv(heads: int, kv_heads: int, head_dim: int) -> Transform:
    """Return the transform of one HF tensor of q, k and v to megatron-core's order of rows.

    The HF tensor has the rows of all query heads, then of all key heads, then of all value heads.
    """
    rows = stacked_rows(heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    return regrouped(rows, grouped_qkv(heads, kv_heads, head_dim))


def check_one_dtype(where: str, dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """Return the common dtype of tensors. Raises CheckpointError if they differ."""
    if len(set(dtypes.values())) > 1:
        (first, seen), (other, odd) = next(
            (pair, item) for pair in dtypes.items() for item in dtypes.items() if item[1] != pair[1]
        )
        raise CheckpointError(
            where,
            f"{first} is {seen} but {other} is {odd}",
            expected="one dtype for tensors that are stored together",
            fix="convert with --dtype fp32 or --dtype bf16",
        )
    return next(iter(dtypes.values()))
