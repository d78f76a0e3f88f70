"""Comparison of what two sides computed, before their times are measured."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class Different(Exception):
    """Error: the sides of a benchmark do not compute the same."""


def largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Compute the largest |difference| of any tensor relative to the largest |entry| of that
    tensor on their side.
    """
    if ours.keys() != theirs.keys():
        raise Different(f"tensors {sorted(ours.keys() ^ theirs.keys())[:3]} are on one side only")
    worst = 0.0
    for name, wanted in theirs.items():
        got = ours[name].to(wanted.device)
        if got.shape != wanted.shape:
            raise Different(f"{name} is {list(got.shape)} on our side and {list(wanted.shape)} on theirs")
        scale = wanted.abs().max().item()
        worst = max(worst, (got - wanted).abs().max().item() / scale if scale else got.abs().max().item())
    return worst


def agree(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, tolerance: float) -> float:
    """Return `largest_difference`. Raises Different if it exceeds the tolerance or is not a
    number.
    """
    worst = largest_difference(ours, theirs)
    if not worst <= tolerance:
        raise Different(f"relative difference {worst:.1e}, tolerance {tolerance:.0e}")
    return worst
