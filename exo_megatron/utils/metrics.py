"""Metrics of a run: JSON lines for programs, TensorBoard events for people."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from exo_megatron.utils.disk import reporting, vanished
from exo_megatron.utils.files import atomic_open, json_line

if TYPE_CHECKING:
    from exo_megatron.utils.events import EventsWriter

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"


class MetricsWriter:
    """A writer of `metrics.jsonl` and, if asked for, of TensorBoard events under `tensorboard/`.

    Nothing is opened before the first record. The step of that record is the step at which the run
    starts or resumes: records of this step and later ones, from an earlier interrupted run, are
    dropped, so that every step occurs once in the file.

    Args:
        directory: the stage's output, which exists.
        tensorboard: whether events are written, too.
        enabled: False on all ranks but one.
    """

    def __init__(self, directory: Path, *, tensorboard: bool, enabled: bool) -> None:
        self._directory = directory
        self._path = directory / METRICS_FILE
        self._tensorboard = tensorboard
        self._enabled = enabled
        self._file: TextIO | None = None
        self._events: EventsWriter | None = None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step. NaN and infinities become null in the JSON.

        Raises StorageError if they cannot be written, or the file is no longer where it was.
        """
        if not self._enabled:
            return
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with reporting(self._path):
            file = self._file if self._file is not None else self._open(step)
            if not os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                raise vanished(self._path)
            file.write(json_line({"step": step, **finite}))
            file.flush()
        if self._events is not None:
            with reporting(self._directory / TENSORBOARD_DIRECTORY):
                self._events.write(step, values)

    def close(self) -> None:
        """Close both files. What could not be written has been told before."""
        for each in (self._file, self._events):
            if each is not None:
                with suppress(OSError):
                    each.close()
        self._file = self._events = None
        self._enabled = False

    def _open(self, first_step: int) -> TextIO:
        if self._path.exists():
            drop_records(self._path, first_step)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - kept open over the run, see close
        if self._tensorboard:
            from exo_megatron.utils.events import EventsWriter

            self._events = EventsWriter(self._directory / TENSORBOARD_DIRECTORY, first_step)
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
