"""Whatever stops a save, the checkpoints before it stay, and nothing half-written looks complete."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from exo_megatron.checkpoint import publish, shard_writer
from exo_megatron.checkpoint import save as saving
from exo_megatron.checkpoint.directory import list_steps, resolve_checkpoint
from exo_megatron.checkpoint.integrity import verify_checkpoint
from exo_megatron.errors import CheckpointError
from tests.unit.checkpoint.conftest import Saver


class Killed(BaseException):
    """Ends a save like SIGKILL would: no handler of failures runs."""


def kill(*args: Any, **kwargs: Any) -> None:
    raise Killed


PHASES: dict[str, tuple[object, str]] = {
    "before weights": (saving, "_write_weights"),
    "after weights": (saving, "_write_small_files"),
    "before checksums": (saving, "record_files"),
    "before manifest": (saving, "write_manifest"),
    "before publishing": (saving, "publish"),
    "while flushing": (publish, "sync_tree"),
    "at the rename": (publish, "os"),
    "before the pointer": (saving, "write_text"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_killed_at(save: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    root = tmp_path / "checkpoints"
    first = save(root / "step-00000001", step=1)
    with monkeypatch.context() as patch:
        module, name = PHASES[phase]
        patch.setattr(module, name, SimpleNamespace(rename=kill, fsync=os.fsync) if name == "os" else kill)
        with pytest.raises(Killed):
            save(root / "step-00000002", value=2.0, step=2)
    newest = root / "step-00000002" if phase == "before the pointer" else first
    assert resolve_checkpoint(tmp_path) == newest
    verify_checkpoint(newest)
    # The next run saves the same step over what was left.
    verify_checkpoint(save(root / "step-00000002", value=2.0, step=2))
    assert [step for step, _ in list_steps(root)] == [1, 2]
    assert sorted(child.name for child in root.iterdir()) == ["latest", "step-00000001", "step-00000002"]
    assert (root / "latest").read_text() == "step-00000002\n"


def test_step_is_replaced(save: Saver, tmp_path: Path) -> None:
    path = save(tmp_path / "step-00000001", step=1)
    before = (path / "manifest.json").read_text()
    save(path, value=3.0, step=1)
    assert (path / "manifest.json").read_text() != before
    verify_checkpoint(path)


def test_converted_model_is_not_replaced(save: Saver, tmp_path: Path) -> None:
    path = save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="already holds a complete output"):
        save(path)
    verify_checkpoint(path)


def no_space_left(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_space_is_seen_before_writing(save: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1234, 1234))
    with pytest.raises(CheckpointError, match=r"needs 67,10\d,\d+ bytes but 1,234 are free"):
        save(tmp_path / "deep" / "model")
    assert not (tmp_path / "deep").exists()


class FullDisk(FileIO):
    """Takes 100 bytes."""

    def write(self, data: Any) -> int:
        if self.tell() + memoryview(data).nbytes > 100:
            no_space_left()
        return super().write(data)


@pytest.mark.parametrize(
    ("module", "name", "failing"),
    [
        (shard_writer, "FileIO", FullDisk),
        (saving, "write_json", no_space_left),
        (saving, "write_manifest", no_space_left),
    ],
)
def test_disk_fills_up_while_writing(
    save: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, name: str, failing: object
) -> None:
    first = save(tmp_path / "step-00000001", step=1)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing)
        with pytest.raises(
            CheckpointError, match=r"could not be written: No space left on device, [\d,]+ bytes are free"
        ):
            save(tmp_path / "step-00000002", step=2)
    assert sorted(child.name for child in tmp_path.iterdir() if child.is_dir()) == ["hf-source", first.name]
    verify_checkpoint(first)


def test_directory_that_cannot_be_written(save: Saver, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "file" / "model")


Make = Callable[[Path], object]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: (path / "thesis.tex").touch(), r"is not empty \(thesis.tex\)"),
        (lambda path: (path / "weights").mkdir(), r"is not empty \(weights\)"),
        (lambda path: (path / ".published").write_text("[]"), None),
        (lambda path: (path / "config.yaml").touch(), None),
    ],
)
def test_output_directories(save: Saver, tmp_path: Path, make: Make, message: str | None) -> None:
    target = tmp_path / "model"
    target.mkdir()
    make(target)
    before = sorted(child.name for child in target.iterdir())
    if message is None:
        verify_checkpoint(save(target))
    else:
        with pytest.raises(CheckpointError, match=message):
            save(target)
        assert sorted(child.name for child in target.iterdir()) == before


def test_stage_interrupted_while_publishing(save: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "import"
    target.mkdir()
    (target / "config.yaml").write_text("hf: x\n")
    renamed: list[str] = []

    def rename(source: Path, destination: Path) -> None:
        if len(renamed) == 2:
            raise Killed
        renamed.append(destination.name)
        os.replace(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(publish, "os", SimpleNamespace(rename=rename, fsync=os.fsync))
        with pytest.raises(Killed):
            save(target)
    assert "manifest.json" not in renamed
    with pytest.raises(CheckpointError):
        resolve_checkpoint(target)
    verify_checkpoint(save(target))
    # Complete, but the stage was not recorded as such before it stopped: it may be done once more.
    verify_checkpoint(save(target, value=2.0))
    (target / "stage.json").write_text("{}")
    with pytest.raises(CheckpointError, match="already holds a complete output"):
        save(target)
    assert (target / "config.yaml").read_text() == "hf: x\n"
