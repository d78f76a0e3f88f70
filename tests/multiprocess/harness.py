"""Runs checks inside a group of processes: one start of the group, many checks, results back through files.

A check is a function `name(runtime, **arguments)` of an importable module, called on every rank in the same order.
What it returns is saved with `torch.save` and given to the test of the parent process, which asserts. A check that
raises on any rank, or outlasts its time, ends the group: that check fails with the tracebacks of its ranks, and the
group starts again with the checks that have not run.

    outcomes = run_checks(2, [Check("sum", "tests.multiprocess.checks_x:sum_of_ranks", {"add": 1})], tmp_path)
    per_rank = outcomes["sum"].values()
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS = 180.0  # importing torch and megatron-core in several processes on a busy machine


@dataclass(frozen=True)
class Check:
    """`function` is "module:name"; `arguments` must pickle."""

    name: str
    function: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Worker:
    """A module that runs on every rank and calls `work`, and additions to its environment."""

    module: str
    environment: Mapping[str, str] = field(default_factory=dict)


class Process(Protocol):
    """What waiting asks of a process, which leads a session."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


class WorldFailure(AssertionError):
    """A check did not finish on every rank."""


@dataclass(frozen=True)
class Outcome:
    """Per rank what the check returned, or why there is nothing."""

    name: str
    results: tuple[Any, ...]
    failure: str | None

    def values(self) -> tuple[Any, ...]:
        """What each rank returned, in rank order. Raises WorldFailure with the ranks' tracebacks."""
        if self.failure is not None:
            raise WorldFailure(f"{self.name}: {self.failure}")
        return self.results


def run_checks(
    world_size: int,
    checks: Sequence[Check],
    directory: Path,
    *,
    check_seconds: float = 60.0,
    worker: Worker | None = None,
) -> dict[str, Outcome]:
    """Run every check in groups of `world_size` processes. `directory` receives logs and results.

    Ranks are forked from a process that has the imports (nursery.py), or are programs of their own with a `worker`.
    """
    outcomes: dict[str, Outcome] = {}
    start = 0
    while len(outcomes) < len(checks):
        remaining = list(checks[len(outcomes) :])
        folder = directory / f"world{world_size}-start{start}"
        folder.mkdir(parents=True)
        torch.save(remaining, folder / "checks.pt")
        problem = _run_group(world_size, folder, START_SECONDS + check_seconds * len(remaining), worker)
        finished = [_collect(world_size, folder, index, check) for index, check in enumerate(remaining)]
        complete = [outcome for outcome in finished if outcome is not None]
        if len(complete) < len(remaining):  # the group ended inside this check
            stopped = remaining[len(complete)]
            complete.append(Outcome(stopped.name, (), f"{problem}\n{_logs(world_size, folder)}"))
        outcomes |= {outcome.name: outcome for outcome in complete}
        start += 1
    return outcomes


def worker_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would set (nothing for a lone process), one thread per process, the repository on the path."""
    torchrun = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return {
        **os.environ,
        **(torchrun if world_size > 1 else {}),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def start_group(
    world_size: int, command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> list[subprocess.Popen[bytes]]:
    """Start `command` once per rank, each in its own session, output to folder/rankN.log."""
    port = free_port()
    processes = []
    for rank in range(world_size):
        with (folder / f"rank{rank}.log").open("ab") as log:
            processes.append(
                subprocess.Popen(
                    command,
                    env={**worker_environment(rank, world_size, port), **(environment or {})},
                    cwd=REPOSITORY,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return processes


def kill_group(processes: Sequence[Process]) -> None:
    """SIGKILL to every rank and to what it started; waits until they are gone."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def wait_group(processes: Sequence[Process], seconds: float) -> str | None:
    """Wait for all ranks. Returns None if all ended with 0, else what went wrong; nothing is left running."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        failed = [f"rank {rank} ended with {code}" for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            time.sleep(1.0)  # the other ranks may have something to say, too
            kill_group(processes)
            return ", ".join(failed)
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)
    kill_group(processes)
    return f"no end after {seconds:.0f} s"


def _run_group(world_size: int, folder: Path, seconds: float, worker: Worker | None) -> str | None:
    if worker is None:
        port = free_port()
        environments = [worker_environment(rank, world_size, port) for rank in range(world_size)]
        return _ask_nursery({"environments": environments, "folder": str(folder), "seconds": seconds})
    command = [sys.executable, "-m", worker.module, str(folder)]
    return wait_group(start_group(world_size, command, folder, worker.environment), seconds)


@cache
def _nursery() -> subprocess.Popen[str]:
    """The process that ranks are forked from, one for this test process, with which it ends."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.multiprocess.nursery"]
    environment = worker_environment(0, 1, 0)
    process = subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(process.kill)
    return process


def _ask_nursery(request: dict[str, Any]) -> str | None:
    nursery = _nursery()
    assert nursery.stdin is not None and nursery.stdout is not None
    print(json.dumps(request), file=nursery.stdin, flush=True)
    answer = nursery.stdout.readline()
    if not answer:
        raise WorldFailure(f"the process that ranks are forked from has ended with {nursery.wait()}")
    problem: str | None = json.loads(answer)
    return problem


def _collect(world_size: int, folder: Path, index: int, check: Check) -> Outcome | None:
    paths = [_result_path(folder, index, rank) for rank in range(world_size)]
    if not all(path.exists() for path in paths):
        return None
    return Outcome(check.name, tuple(torch.load(path, weights_only=False, map_location="cpu") for path in paths), None)


def _logs(world_size: int, folder: Path) -> str:
    lines = []
    for rank in range(world_size):
        tail = (folder / f"rank{rank}.log").read_text(errors="replace").splitlines()[-40:]
        lines += [f"--- rank {rank}", *tail]
    return "\n".join(lines)


def _result_path(folder: Path, index: int, rank: int) -> Path:
    return folder / f"result{index:03d}-rank{rank}.pt"


def work(folder: Path) -> None:
    """One rank: every check in order; the first that raises ends the process at once, so that no peer waits long."""
    torch.set_num_threads(1)
    from exo_megatron.parallel.runtime import distributed_runtime

    checks: list[Check] = torch.load(folder / "checks.pt", weights_only=False)
    with distributed_runtime() as runtime:
        for index, check in enumerate(checks):
            module, _, name = check.function.partition(":")
            try:
                value = vars(importlib.import_module(module))[name](runtime, **check.arguments)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            path = _result_path(folder, index, runtime.rank)
            torch.save(value, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
            runtime.barrier()
