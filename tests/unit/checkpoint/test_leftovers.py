"""What a killed run was writing or removing goes at the next start; what a live process writes stays."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from exo_megatron.checkpoint import publish
from exo_megatron.checkpoint.directory import MANIFEST_FILE, STAGING_MARKER
from exo_megatron.checkpoint.publish import remove_checkpoint, remove_leftovers
from exo_megatron.config.stages import ScoreConfig
from exo_megatron.stages.run import execute_stage
from exo_megatron.utils.files import atomic_open, is_abandoned

DEAD = 2**22 + 1
"""A number that no process has."""


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out" / "candidates").mkdir(parents=True)
    return tmp_path / "out"


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.communicate(b"\n")


def temporary(directory: Path, pid: int, machine: str | None = None) -> Path:
    """A file as a process with this number leaves it when it is killed."""
    with pytest.raises(KeyError), atomic_open(directory / "metrics.jsonl") as file:
        made = Path(file.name)
        raise KeyError
    parts = made.name.split("-")
    kept = made.with_name("-".join([parts[0], machine or parts[1], str(pid), parts[3]]))
    kept.write_text("half")
    return kept


def mark(directory: Path, pid: int, host: str | None = None) -> Path:
    directory.mkdir(parents=True)
    started = psutil.Process(pid).create_time() if psutil.pid_exists(pid) else 0.0
    owner = {"host": host or socket.gethostname(), "pid": pid, "started": started}
    (directory / STAGING_MARKER).write_text(json.dumps(owner))
    (directory / "weights").mkdir()
    (directory / "weights" / "0.distcp").write_bytes(b"half")
    return directory


def test_files_of_dead_processes_go_and_others_stay(output: Path, other: subprocess.Popen[bytes]) -> None:
    dead = [temporary(output, DEAD), temporary(output / "candidates", DEAD)]
    live = [temporary(output, other.pid), temporary(output, os.getpid()), temporary(output, DEAD, "0123abcd")]
    (output / ".mine.tmp-1").write_text("of the user")
    remove_leftovers(output, output)
    assert [path.exists() for path in dead] == [False, False]
    assert [path.exists() for path in live] == [True, True, True]
    assert (output / ".mine.tmp-1").exists()


def test_the_number_of_a_dead_process_may_be_that_of_a_new_one(output: Path) -> None:
    path = temporary(output, os.getpid())
    assert not is_abandoned(path)
    os.utime(path, (0, 0))
    assert is_abandoned(path)


def test_what_another_machine_has_not_touched_for_long_is_given_up(output: Path) -> None:
    path, staging = temporary(output, os.getpid(), "0123abcd"), mark(output.parent / "tmp-out", 1, host="elsewhere")
    remove_leftovers(output, output)
    assert path.exists() and staging.exists()
    for each in (path, staging, *staging.rglob("*")):
        os.utime(each, (0, 0))
    remove_leftovers(output, output)
    assert not path.exists() and not staging.exists()


def test_stagings_and_half_removed_steps_go(output: Path, other: subprocess.Popen[bytes]) -> None:
    steps = output / "checkpoints"
    half, staging = mark(steps / "step-00000003", DEAD), mark(steps / "tmp-step-00000006", DEAD)
    whole = mark(steps / "step-00000009", DEAD)
    (whole / MANIFEST_FILE).write_text("{}")
    live = [mark(steps / "tmp-step-00000012", other.pid), mark(steps / "step-00000015", other.pid)]
    users = steps / "step-of-mine"
    users.mkdir()
    beside = mark(output.parent / "tmp-out", DEAD)
    remove_leftovers(output, output)
    assert not half.exists() and not staging.exists() and not beside.exists()
    assert whole.is_dir() and not (whole / STAGING_MARKER).exists(), "it was complete, only not declared so"
    assert all((each / STAGING_MARKER).exists() for each in live)
    assert users.is_dir()


def test_a_removal_that_is_killed_is_ended_by_the_next_start(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = output / "checkpoints" / "step-00000003"
    (step / "weights").mkdir(parents=True)
    (step / MANIFEST_FILE).write_text("{}")

    def killed(path: Path) -> None:
        assert not (step / MANIFEST_FILE).exists(), "it must not look complete"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(publish, "remove_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_checkpoint(step)
    marker = step / STAGING_MARKER
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "pid": DEAD}))
    remove_leftovers(output, output)
    assert not step.exists()


def test_every_stage_begins_with_it(calls, lone_runtime, output: Path) -> None:  # type: ignore[no-untyped-def]
    path = temporary(output, DEAD)
    config = ScoreConfig.model_validate({"output": output, "candidates": "c", "reward": {"function": "a:b"}})
    execute_stage("score", "score", config, "digest", lone_runtime)
    assert not path.exists()


@pytest.fixture
def lone_runtime():  # type: ignore[no-untyped-def]
    from tests.unit.conftest import LoneRuntime

    return LoneRuntime()
