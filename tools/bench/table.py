"""The table that a benchmark prints."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Table:
    """Table of a benchmark.

    rows: as many cells as there are columns. notes: lines below the table: what was compared, how,
    and what the words mean.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """Format the table as GitHub's Markdown, columns aligned."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        shown = [
            "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
        ]
        shown.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
        return "\n".join([f"{self.title}", "", *shown, "", *self.notes, f"Machine: {machine()}."])

    def as_json(self) -> dict[str, object]:
        """Return the table as a dict for JSON."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"title": self.title, "rows": rows, "notes": list(self.notes), "machine": machine()}


def machine() -> str:
    """Describe device, threads and versions in a few words."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    threads = f"{torch.get_num_threads()} thread" + ("s" if torch.get_num_threads() > 1 else "")
    return f"{device}, {threads}, torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
