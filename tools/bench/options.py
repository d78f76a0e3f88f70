"""Options that every benchmark gets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """Options of a benchmark.

    quick: small sizes. rounds: how often each side is timed. pictures: directory for pictures.
    """

    quick: bool
    rounds: int
    pictures: Path
