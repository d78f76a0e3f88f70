"""Whatever stops a save, the checkpoints before it stay, and nothing half-written looks complete."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest

from exo_megatron.checkpoint import publish, shard_writer
from exo_megatron.checkpoint import save as saving
from exo_megatron.checkpoint.directory import STAGING_MARKER, list_steps, resolve_checkpoint
from exo_megatron.checkpoint.dist_format import Writing
from exo_megatron.checkpoint.safety import verify_checkpoint
from exo_megatron.checkpoint.save import save_checkpoint
from exo_megatron.errors import CheckpointError, DataError, ExoError, StorageError
from exo_megatron.parallel.runtime import Runtime
from tests.unit.checkpoint.conftest import SPEC, Saver, sharded


class Killed(BaseException):
    """Ends a save like SIGKILL would: no handler of failures runs."""


def kill(*args: Any, **kwargs: Any) -> None:
    raise Killed


PHASES: dict[str, tuple[object, str]] = {
    "before weights": (saving, "_plan"),
    "before the tensors": (Writing, "write"),
    "before the index": (Writing, "end"),
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


@pytest.mark.parametrize("step", [None, 2])
def test_killed_right_after_the_rename(
    save: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int | None
) -> None:
    target = tmp_path / "root" / ("model" if step is None else "step-00000002")

    def rename(source: Path, destination: Path) -> None:
        os.rename(source, destination)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(publish, "os", SimpleNamespace(rename=rename, fsync=os.fsync))
        with pytest.raises(Killed):
            save(target, step=step)
    assert list_steps(tmp_path / "root") == []
    with pytest.raises(CheckpointError, match="is an output in the making, or left by a run that was stopped"):
        resolve_checkpoint(target)
    verify_checkpoint(save(target, step=step))
    assert resolve_checkpoint(target) == target
    assert STAGING_MARKER not in (target / "manifest.json").read_text()
    assert not (target / STAGING_MARKER).exists()


@pytest.mark.parametrize("step", [None, 2])
def test_a_directory_of_the_user_beside_the_target(save: Saver, tmp_path: Path, step: int | None) -> None:
    notes = tmp_path / "tmp-base" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    with pytest.raises(CheckpointError, match=r"tmp-base: holds what no run of ours has made \(notes.txt\); .*; fix: "):
        save(tmp_path / "base", step=step)
    assert [child.name for child in notes.parent.iterdir()] == ["notes.txt"]
    assert not (tmp_path / "base").exists()
    notes.unlink()
    verify_checkpoint(save(tmp_path / "base", step=step))


def test_a_file_of_the_user_in_the_place_of_staging(save: Saver, tmp_path: Path) -> None:
    (tmp_path / "tmp-base").touch()
    with pytest.raises(CheckpointError, match="tmp-base: is not a directory"):
        save(tmp_path / "base")
    assert (tmp_path / "tmp-base").is_file()


def test_staging_of_another_process(save: Saver, tmp_path: Path) -> None:
    marker = tmp_path / "tmp-base" / STAGING_MARKER
    marker.parent.mkdir()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        started = psutil.Process(other.pid).create_time()
        owner = {"host": socket.gethostname(), "pid": other.pid, "started": started}
        marker.write_text(json.dumps(owner))
        with pytest.raises(CheckpointError, match=f"is being written by process {other.pid} of this host"):
            save(tmp_path / "base")
        assert marker.exists()
        # Another process that has the number of one that is gone.
        marker.write_text(json.dumps(owner | {"started": started - 60}))
        verify_checkpoint(save(tmp_path / "base"))
        marker.parent.mkdir()
        marker.write_text(json.dumps(owner))
        other.kill()
        other.wait()
        shutil.rmtree(tmp_path / "base")
        verify_checkpoint(save(tmp_path / "base"))
    assert not marker.parent.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1, "pid": "x", "started": null}'])
def test_staging_whose_marker_was_cut_off(save: Saver, tmp_path: Path, content: str) -> None:
    (tmp_path / "tmp-base").mkdir()
    (tmp_path / "tmp-base" / STAGING_MARKER).write_text(content)
    verify_checkpoint(save(tmp_path / "base"))


def test_staging_is_marked_until_its_marker_is_all_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = publish.make_staging(tmp_path / "base")
    for name in ("a", "b"):
        (staging / name).touch()
    with monkeypatch.context() as patch:
        patch.setattr(publish.shutil, "rmtree", kill)
        with pytest.raises(Killed):
            publish.remove_tree(staging)
    assert [child.name for child in staging.iterdir()] == [STAGING_MARKER]


@pytest.mark.parametrize("failing", [RuntimeError, OSError, DataError, CheckpointError])
def test_inspection_that_fails(runtime: Runtime, hf_files: Path, tmp_path: Path, failing: type[Exception]) -> None:
    def inspect(made: Path) -> None:
        with pytest.raises(CheckpointError, match="is an output in the making"):
            resolve_checkpoint(made)
        raise failing("x", "y", expected="", fix="") if issubclass(failing, ExoError) else failing("x")

    with pytest.raises(failing):
        save_checkpoint(
            tmp_path / "root" / "model",
            sharded(),
            spec=SPEC,
            hf_files=hf_files,
            step=None,
            kind="model",
            trainer_state=None,
            runtime=runtime,
            inspect=inspect,
        )
    assert not list((tmp_path / "root").iterdir())


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
    with pytest.raises(StorageError, match=r"needs 67,10\d,\d+ bytes but 1,234 are free"):
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
        with pytest.raises(StorageError, match=r"could not be written: No space left on device, [\d,]+ bytes are free"):
            save(tmp_path / "step-00000002", step=2)
    assert sorted(child.name for child in tmp_path.iterdir() if child.is_dir()) == ["hf-source", first.name]
    verify_checkpoint(first)


def test_source_file_that_cannot_be_read(save: Saver, hf_files: Path, tmp_path: Path) -> None:
    (hf_files / "vocab.json").symlink_to("/proc/self/mem")  # the start of memory is never mapped
    with pytest.raises(
        CheckpointError, match=r"hf-source/vocab.json: cannot be read \(Input/output error\); expected a rea"
    ):
        save(tmp_path / "model")
    assert [child.name for child in tmp_path.iterdir()] == ["hf-source"]


def test_directory_that_cannot_be_written(save: Saver, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="could not be written"):
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
