"""One run at a time writes to an output directory: who is alive is respected, who is dead is not waited for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from exo_megatron.config.stages import LOCK_FILE
from exo_megatron.errors import OutputInUse
from exo_megatron.stages import lock as module
from exo_megatron.stages.lock import STALE_SECONDS, OutputLock, Owner, this_process

Hold = Callable[..., Owner]


@pytest.fixture
def alive() -> Iterator[int]:
    """The id of another process of this machine."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.kill()
    process.wait()


@pytest.fixture
def hold(tmp_path: Path) -> Hold:
    """Writes the lock of another run: its fields, and how long ago it was renewed."""

    def write(*, age: float = 0.0, **fields: Any) -> Owner:
        owner = replace(this_process(), token="other", **fields)
        file = tmp_path / LOCK_FILE
        file.write_text(json.dumps(asdict(owner)))
        then = time.time() - age
        os.utime(file, (then, then))
        return owner

    return write


def started(pid: int) -> float:
    import psutil

    return psutil.Process(pid).create_time()


ELSEWHERE = {"host": "n7", "machine": "another boot", "pid": 4}


def assert_taken(directory: Path) -> None:
    lock = OutputLock(directory)
    lock.acquire()
    assert json.loads((directory / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()
    assert list(directory.iterdir()) == []


def assert_refused(directory: Path, *words: str) -> None:
    before = {path: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(OutputInUse) as refusal:
        OutputLock(directory).acquire()
    assert refusal.value.exit_code == 2
    for word in words:
        assert word in str(refusal.value)
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


def test_a_free_directory_is_locked_and_freed(tmp_path: Path) -> None:
    assert_taken(tmp_path / "new")


def test_a_live_process_of_this_machine_holds_it_even_if_it_is_frozen(tmp_path: Path, hold: Hold, alive: int) -> None:
    owner = hold(age=10 * STALE_SECONDS, pid=alive, started=started(alive), job="c/12")
    assert_refused(tmp_path, f"process {alive} on {owner.host}, Slurm job 12, since {owner.since}", "one run at a time")


def test_a_dead_process_of_this_machine_does_not(tmp_path: Path, hold: Hold, alive: int) -> None:
    """Its number may be that of another process by now, or of this one."""
    hold(pid=2**22 + 1)
    assert_taken(tmp_path)
    hold(pid=alive, started=started(alive) - 100)
    assert_taken(tmp_path)
    hold(pid=os.getpid(), started=0.0)
    assert_taken(tmp_path)


def test_another_machine_holds_it_while_it_renews_it(tmp_path: Path, hold: Hold) -> None:
    hold(**ELSEWHERE, age=STALE_SECONDS - 20)
    assert_refused(tmp_path, "process 4 on n7", "last sign of life 10")
    hold(**ELSEWHERE, age=STALE_SECONDS + 20)
    assert_taken(tmp_path)


def test_a_requeued_job_takes_over_from_its_former_life(
    tmp_path: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "c")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    hold(**ELSEWHERE, life=2)  # another step of the same life
    assert_refused(tmp_path, "n7, Slurm job 12")
    hold(**ELSEWHERE, life=1, job="d/12")
    assert_refused(tmp_path, "n7")
    hold(**ELSEWHERE, life=1, job="c/12")
    assert_taken(tmp_path)


def test_a_lock_that_was_cut_off_while_it_was_written_counts_by_its_age(tmp_path: Path) -> None:
    file = tmp_path / LOCK_FILE
    file.write_text('{"token": "ab')
    assert_refused(tmp_path, "another run")
    os.utime(file, (1, 1))
    assert_taken(tmp_path)


def test_of_many_that_take_over_one_gets_it(tmp_path: Path, hold: Hold) -> None:
    for _ in range(5):
        hold(pid=2**22 + 1)
        gate, got, refused = threading.Barrier(8), [], []

        def take(gate=gate, got=got, refused=refused) -> None:
            lock = OutputLock(tmp_path)
            gate.wait()
            try:
                lock.acquire()
                got.append(lock)
            except OutputInUse:
                refused.append(lock)

        # All have one process id here, which would let them take over from each other.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_is_alive", lambda holder, age, own: holder.token != "other")
            threads = [threading.Thread(target=take) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert (len(got), len(refused)) == (1, 7)
        got[0].release()
        assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_slower_than_another_one_leaves_its_lock(
    tmp_path: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found a dead holder; the other one has taken over before this one does."""
    hold(pid=2**22 + 1)
    other, faster = OutputLock(tmp_path), []

    def judge(holder: Owner, age: float, own: Owner) -> bool:
        if not faster:
            faster.append(True)
            other.acquire()
        return False

    monkeypatch.setattr(module, "_is_alive", judge)
    with pytest.raises(OutputInUse):
        OutputLock(tmp_path).acquire()
    other.release()
    assert list(tmp_path.iterdir()) == []


def test_it_is_renewed_and_a_run_that_has_lost_it_ends(
    tmp_path: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[tuple[str, int]] = []
    left = threading.Event()
    monkeypatch.setattr(module, "leave_with", lambda text, code: (ended.append((text, code)), left.set()))
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.02)
    lock = OutputLock(tmp_path)
    lock.acquire()
    os.utime(tmp_path / LOCK_FILE, (1, 1))
    deadline = time.monotonic() + 10
    while (tmp_path / LOCK_FILE).stat().st_mtime < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert time.time() - (tmp_path / LOCK_FILE).stat().st_mtime < 10
    assert not ended
    hold(**ELSEWHERE)
    assert left.wait(10)
    assert ended[0][1] == 2 and "process 4 on n7" in ended[0][0]
    lock.release()
    assert (tmp_path / LOCK_FILE).exists()  # that of the other run


def test_a_directory_that_is_moved_away_leaves_a_new_one_locked(tmp_path: Path) -> None:
    lock = OutputLock(tmp_path / "out")
    lock.acquire()
    (tmp_path / "out" / "result").touch()
    kept = lock.move_away(lambda: (tmp_path / "out").rename(tmp_path / "old"))
    assert [path.name for path in kept.iterdir()] == ["result"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_FILE]
    lock.release()
