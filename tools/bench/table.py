"""The table that a benchmark prints."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Record:
    """Figures of one case that are kept and compared with those of later versions.

    counts: of work, the same on every machine. ratios: of times within one run; more is better.
    """

    case: str
    counts: Mapping[str, int]
    ratios: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """Table of a benchmark.

    rows: as many cells as there are columns. notes: lines below the table: what was compared, how,
    and what the words mean. records: what is to be kept of it.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str] = ()
    records: Sequence[Record] = ()

    def markdown(self, *, with_machine: bool = True) -> str:
        """Format the table as GitHub's Markdown, columns aligned.

        with_machine: end with a line that describes it.
        """
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        shown = [
            "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
        ]
        shown.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
        last = [f"Machine: {machine()}."] if with_machine else []
        return "\n".join([f"{self.title}", "", *shown, "", *self.notes, *last])

    def as_json(self) -> dict[str, object]:
        """Return the table as a dict for JSON."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        records = {
            record.case: {
                "counts": dict(record.counts),
                "ratios": {name: round(value, 3) for name, value in record.ratios.items()},
            }
            for record in self.records
        }
        return {"title": self.title, "rows": rows, "notes": list(self.notes), "machine": machine(), "records": records}


def machine() -> str:
    """Describe device, threads and versions in a few words."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    threads = f"{torch.get_num_threads()} thread" + ("s" if torch.get_num_threads() > 1 else "")
    return f"{device}, {threads}, torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
