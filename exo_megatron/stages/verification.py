"""The findings of a verification, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from exo_megatron.utils.tables import render_table, stdout_width

_SHOWN = 10
"""Lines shown of a check that failed."""

Verdict = Literal["pass", "FAIL", "not compared", "not comparable"]
"""Result of a check.

not compared: a comparison would need more memory or another transformers. not comparable: there is
nothing to compare with.
"""


@dataclass(frozen=True)
class Check:
    """One comparison. details: lines that say what differs, or why nothing was compared."""

    name: str
    compared: str
    difference: str
    verdict: Verdict
    details: tuple[str, ...] = ()


def render(checks: Sequence[Check]) -> str:
    """Format the table, and below it the details of each check that has some."""
    lines = [(check.name, check.compared, check.difference, check.verdict) for check in checks]
    text = [render_table(("check", "compared", "largest difference", "result"), lines, width=stdout_width())]
    for check in checks:
        text += [f"{check.name}: {detail}" for detail in check.details[:_SHOWN]]
        if len(check.details) > _SHOWN:
            text.append(f"{check.name}: and {len(check.details) - _SHOWN} more")
    return "\n".join(text)
