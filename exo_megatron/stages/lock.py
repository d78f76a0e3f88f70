"""The lock of an output directory: one run at a time writes there, on whatever node.

It is a file in the directory, so that it needs no locks of the file system, which a network may lack. Its content says
who holds it; its time of change is renewed while the holder lives. A dead holder's lock is taken over: at once where
its process can be looked for, or where this is the requeued job of the holder; else when it has not been renewed for
STALE_SECONDS.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from exo_megatron.config.stages import LOCK_FILE
from exo_megatron.errors import OutputInUse
from exo_megatron.parallel.watch.bulletin import leave_with

RENEW_SECONDS = 10.0
STALE_SECONDS = 120.0
"""Seconds after which a lock that was not renewed is that of a dead run: longer than a file system may hang."""

SAME_START_SECONDS = 5.0
"""Seconds by which two readings of a process's start may differ, as clocks are set."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
        token: identifies this hold.
        host, pid: of the process.
        machine: boot and process namespace in which the pid means this process.
        started: time of its start, in seconds since 1970.
        job: of Slurm, with its cluster; empty outside of a job.
        life: how often the job had been requeued.
        since: time of the lock, in words.
    """

    token: str
    host: str
    pid: int
    machine: str
    started: float
    job: str
    life: int
    since: str


def this_process() -> Owner:
    """Describe this process as the holder of a new lock."""
    process, env = psutil.Process(), os.environ
    restarts = env.get("SLURM_RESTART_COUNT", "0")
    job = f"{env.get('SLURM_CLUSTER_NAME', '')}/{env['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in env else ""
    return Owner(
        token=secrets.token_hex(16),
        host=socket.gethostname(),
        pid=process.pid,
        machine=_machine(),
        started=process.create_time(),
        job=job,
        life=int(restarts) if restarts.isdigit() else 0,
        since=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
    )


def _machine() -> str:
    """Identify the running system and the process namespace; empty where they are unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class OutputLock:
    """The lock of a directory, once it is acquired. One process of a run holds it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = directory / LOCK_FILE
        self._owner: Owner | None = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock, and renew it from now on in a thread. The directory is made where it is missing.

        Raises OutputInUse, with nothing touched, if a run that is alive holds it; OSError.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        owner = this_process()
        if not _create(self._file, owner):
            self._take_over(owner)
        self._owner = owner
        self._end.clear()
        self._thread = threading.Thread(target=self._renew, args=(owner,), name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back, if it is held."""
        self._stop()
        owner, self._owner = self._owner, None
        if owner is not None:
            _remove(self._file, owner)

    def move_away(self, move: Callable[[], Path]) -> Path:
        """Rename the locked directory with `move`, which returns its new path, and lock a new one in its place."""
        self._stop()
        owner, self._owner = self._owner, None
        kept = move()
        if owner is not None:
            _remove(kept / LOCK_FILE, owner)
            self.acquire()
        return kept

    def _stop(self) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=RENEW_SECONDS)

    def _renew(self, owner: Owner) -> None:
        while not self._end.wait(RENEW_SECONDS):
            with suppress(OSError):  # tried again; a directory that is gone is told where it is written to
                found = _read(self._file)[1]
                if found is not None and found.token != owner.token:
                    leave_with(f"exo-megatron: {_in_use(self._directory, found, 0.0)}", OutputInUse.exit_code)
                os.utime(self._file)

    def _take_over(self, owner: Owner) -> None:
        content, holder = _read(self._file)
        age = _age(self._file)
        if content is not None and _is_alive(holder, age, owner):
            raise _in_use(self._directory, holder, age)
        guard = self._file.with_name(f"{LOCK_FILE}.next")
        if not _create(guard, owner):
            if _age(guard) < STALE_SECONDS:
                raise _in_use(self._directory, _read(guard)[1], _age(guard))
            guard.unlink(missing_ok=True)  # of a process that was killed between two system calls
            raise _in_use(self._directory, holder, age)
        try:
            if _read(self._file)[0] != content:  # another run was faster
                raise _in_use(self._directory, _read(self._file)[1], 0.0)
            os.replace(guard, self._file)
        finally:
            guard.unlink(missing_ok=True)


def _create(file: Path, owner: Owner) -> bool:
    """Write a file that must not exist; tells whether it did not."""
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as stream:
        stream.write(json.dumps(asdict(owner)))
        stream.flush()
        os.fsync(stream.fileno())
    return True


def _read(file: Path) -> tuple[bytes | None, Owner | None]:
    """Read a lock: its content, None if it is gone, and its owner, None if it names none."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None, None
    try:
        return content, Owner(**json.loads(content))
    except (ValueError, TypeError):  # killed while it was written
        return content, None


def _remove(file: Path, owner: Owner) -> None:
    with suppress(OSError):
        found = _read(file)[1]
        if found is not None and found.token == owner.token:
            file.unlink()


def _age(file: Path) -> float:
    """Return the seconds since a file was changed, by the clock of its file system."""
    probe = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    probe.touch()
    try:
        now = probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
    try:
        return max(now - file.stat().st_mtime, 0.0)
    except FileNotFoundError:
        return 0.0


def _is_alive(holder: Owner | None, age: float, own: Owner) -> bool:
    """Tell whether the holder of a lock lives; `age` is that of its last renewal."""
    if holder is not None:
        if holder.machine and holder.machine == own.machine:
            return holder.pid != own.pid and _runs(holder)
        if holder.job and holder.job == own.job and holder.life < own.life:
            return False  # Slurm has ended the job before it started it again
    return age < STALE_SECONDS


def _runs(holder: Owner) -> bool:
    try:
        process = psutil.Process(holder.pid)
        same = abs(process.create_time() - holder.started) < SAME_START_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _in_use(directory: Path, holder: Owner | None, age: float) -> OutputInUse:
    who = "another run"
    if holder is not None:
        job = f", Slurm job {holder.job.rpartition('/')[2]}" if holder.job else ""
        who = f"process {holder.pid} on {holder.host}{job}, since {holder.since}"
    return OutputInUse(
        str(directory),
        f"is in use by {who} (last sign of life {age:.0f} s ago)",
        expected="one run at a time for an output",
        fix=f"wait for it to end, or choose another output; what a dead run on another node held is free after "
        f"{STALE_SECONDS:.0f} s",
    )
