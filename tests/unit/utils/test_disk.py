"""A full disk, and an output that is taken away, end in one line wherever a stage writes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exo_megatron.errors import StorageError
from exo_megatron.utils import disk
from exo_megatron.utils.disk import check_space, reporting_all
from exo_megatron.utils.events import EventsWriter
from exo_megatron.utils.metrics import MetricsWriter

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_whatever_wrote(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=r"out: could not be written: No space left on device, [\d,]+ bytes are free"),
        reporting_all(tmp_path / "out"),
    ):
        raise FULL


@pytest.mark.parametrize(("file", "told"), [("out/report.html", True), ("data/prompts.jsonl", False)])
def test_other_failures_are_told_of_the_output_alone(file: str, told: bool, tmp_path: Path) -> None:
    with pytest.raises(StorageError if told else FileNotFoundError) as caught, reporting_all(tmp_path / "out"):
        (tmp_path / file).read_bytes()
    assert not told or "report.html: is gone" in str(caught.value)


def test_a_full_disk_is_seen_before_long_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1234)
    check_space(tmp_path, 1234)
    with pytest.raises(StorageError, match="needs 1,235 bytes but 1,234 are free"):
        check_space(tmp_path, 1235)


class Full:
    """A file whose disk is full."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: object) -> int:
        raise FULL

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def fill_metrics(writer: MetricsWriter) -> None:
    writer._file = Full(writer._file)  # type: ignore[assignment]


def fill_events(writer: MetricsWriter) -> None:
    assert isinstance(writer._events, EventsWriter)
    writer._events._records._writer = Full(writer._events._file)


@pytest.mark.parametrize(
    ("fill", "where"), [(fill_metrics, "metrics.jsonl"), (fill_events, "tensorboard")], ids=["metrics", "events"]
)
def test_the_disk_fills_between_two_steps(fill: Callable[[MetricsWriter], None], where: str, tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=True, enabled=True)
    writer.write(1, {"loss": 1.0})
    fill(writer)
    with pytest.raises(StorageError, match=rf"{where}: could not be written: No space left"):
        writer.write(2, {"loss": 1.0})
    writer.close()


def test_the_output_is_taken_away_between_two_steps(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    writer = MetricsWriter(tmp_path / "out", tensorboard=False, enabled=True)
    writer.write(1, {"loss": 1.0})
    (tmp_path / "out").rename(tmp_path / "moved")
    with pytest.raises(StorageError, match=r"metrics\.jsonl: is gone"):
        writer.write(2, {"loss": 1.0})
    assert not (tmp_path / "out").exists()
    writer.close()
