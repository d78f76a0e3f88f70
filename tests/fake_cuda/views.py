"""Operators that launch nothing on a device: views, and allocations."""

from __future__ import annotations

VIEWS = frozenset(
    {
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "permute",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "expand",
        "alias",
        "detach",
        "as_strided",
        "split",
        "split_with_sizes",
        "unbind",
        "unfold",
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "lift_fresh",
        "reshape",
        "_reshape_alias",
        "view_as",
        "chunk",
        "diagonal",
        "narrow",
    }
)
