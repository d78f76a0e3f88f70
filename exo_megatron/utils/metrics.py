"""Metrics of a run: JSON lines for programs, TensorBoard events for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from exo_megatron.utils.files import atomic_open, json_line

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"


class MetricsWriter:
    """A writer of `metrics.jsonl` and, if asked for, of TensorBoard events under `tensorboard/`.

    Nothing is opened before the first record. The step of that record is the step at which the run
    starts or resumes: records of this step and later ones, from an earlier interrupted run, are
    dropped, so that every step occurs once in the file.

    Args:
        directory: the stage's output.
        tensorboard: whether events are written, too.
        enabled: False on all ranks but one.
    """

    def __init__(self, directory: Path, *, tensorboard: bool, enabled: bool) -> None:
        self._directory = directory
        self._tensorboard = tensorboard
        self._enabled = enabled
        self._file: TextIO | None = None
        self._events: SummaryWriter | None = None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step. NaN and infinities become null in the JSON."""
        if not self._enabled:
            return
        file = self._file if self._file is not None else self._open(step)
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        file.write(json_line({"step": step, **finite}))
        file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Write the remaining events to disk and close both files."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None
        self._enabled = False

    def _open(self, first_step: int) -> TextIO:
        path = self._directory / METRICS_FILE
        self._directory.mkdir(parents=True, exist_ok=True)
        if path.exists():
            drop_records(path, first_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - kept open over the run, see close
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self._directory / TENSORBOARD_DIRECTORY), purge_step=first_step)
        return self._file


def drop_records(path: Path, first_step: int) -> None:
    """Remove the records with step >= `first_step`, and lines that a crash cut short."""
    with open(path, encoding="utf-8", errors="replace") as file:
        kept = [line for line in file if _step(line) < first_step]
    with atomic_open(path) as file:
        file.writelines(kept)


def _step(line: str) -> float:
    """Return the step of a stored record; infinity for a line that is not a complete record."""
    try:
        record: Any = json.loads(line)
    except ValueError:
        return math.inf
    if not line.endswith("\n") or not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return math.inf
    return float(record["step"])
