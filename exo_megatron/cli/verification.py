"""What a verification is asked for, and what it finds, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from exo_megatron.config.sections import ParallelConfig

if TYPE_CHECKING:
    from exo_megatron.conversion.verifying import Direction

EXPORT_MARKER = "exo_export.json"
"""Written last into an exported HF checkpoint: where it comes from, and its files with their sizes."""

TOLERANCE = 1e-4
"""Of logits: |difference| <= TOLERANCE * max(1, largest |logit|)."""

_SHOWN = 10
"""Lines shown of a check that failed."""

Verdict = Literal["pass", "FAIL", "not compared", "not comparable"]
"""not compared: it could have been, with more memory or another transformers. not comparable: there is nothing to
compare with."""


@dataclass(frozen=True)
class Verification:
    """What is compared, and how.

    prompts: a JSONL file ({"prompt": ..., "completions": [...]}; completions are optional) or a text file with a
    prompt in every line; None: the built-in ones. tensors_only: without the logits. made: None: as the HF checkpoint
    says of itself.
    """

    hf: Path
    checkpoint: Path
    parallel: ParallelConfig
    tolerance: float = TOLERANCE
    prompts: Path | None = None
    tensors_only: bool = False
    made: Direction | None = None


@dataclass(frozen=True)
class Check:
    """A row of the table. details: lines that say what differs, or why nothing was compared."""

    name: str
    compared: str
    difference: str
    verdict: Verdict
    details: tuple[str, ...] = ()


def render(checks: Sequence[Check]) -> str:
    """The table, and below it the details of each row that has some."""
    rows = [("check", "compared", "largest difference", "result")]
    rows += [(check.name, check.compared, check.difference, check.verdict) for check in checks]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    for check in checks:
        lines += [f"{check.name}: {text}" for text in check.details[:_SHOWN]]
        if len(check.details) > _SHOWN:
            lines.append(f"{check.name}: and {len(check.details) - _SHOWN} more")
    return "\n".join(lines)
