"""How a world meets, and how it ends when a rank fails, is killed, freezes or hangs: nobody waits, and all are told.

One process imports torch and forks the three ranks of every case, so that a case takes seconds. The ranks use torch's
own gloo group under our store and watch. Rank 0 holds the store, as under srun and mpirun.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODES = ["all", "later", "each", "rank0", "rank1", "crash1", "crashes", "kill0", "kill1", "stop0", "stop1", "slow1"]
MODES += ["suspended", "hang1", "fine", "missing1", "twice1", "larger1"]
TIMEOUT, STALL = 4.0, 6.0
DRIVER = """
import json, os, signal, socket, sys, tempfile, threading, time
from datetime import timedelta
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from exo_megatron.config.sections import RuntimeConfig
from exo_megatron.errors import DataError, ExoError, TryAgainLater
from exo_megatron.parallel.launch import Launch
from exo_megatron.parallel.leaving import leaving_together, report
from exo_megatron.parallel.rendezvous import meet
from exo_megatron.parallel.watch import bulletin
from exo_megatron.parallel.watch.start import start_watch

WORLD = 3
SECONDS = 60
IDLE = ["stop0", "stop1", "slow1", "suspended", "hang1", "missing1", "twice1"]  # they wait, and do so together
TIMEOUT, STALL = float(sys.argv[1]), float(sys.argv[2])
bulletin.GRACE_SECONDS = 20.0  # whatever the machine does, a rank that can leaves by itself
stalling = lambda mode: STALL if mode == "hang1" else 600

def rank_of(rank, port, mode):
    world = WORLD + (mode == f"larger{rank}")
    launch = Launch("torchrun", rank, world, rank, "127.0.0.1", port)
    limits = RuntimeConfig(timeout_seconds=TIMEOUT, stall_seconds=stalling(mode))
    try:
        store = meet(launch, 2.0 if mode == "missing1" else SECONDS)
    except ExoError as error:
        os._exit(report(error))
    watch = start_watch(launch, limits, store)
    with leaving_together(rank, watch):
        dist.init_process_group("gloo", store=PrefixStore("groups", store), rank=rank, world_size=WORLD)
        dist.barrier()
        watch.begin("rehearsal")
        if mode in ("all", f"rank{rank}"):
            raise DataError("d.jsonl:3", "bad", expected="good", fix="mend")
        if mode == "later":
            raise TryAgainLater("x", "down", expected="up", fix="wait")
        if mode == "each":
            raise DataError(f"d.jsonl:{rank}", "bad", expected="good", fix="mend")
        if mode in ("crashes", f"crash{rank}"):
            raise ZeroDivisionError("by nought")
        if mode in (f"kill{rank}", f"stop{rank}", "suspended"):
            time.sleep(1.0)  # until a beat has told of the rehearsal
            os.kill(os.getpid(), signal.SIGKILL if mode == f"kill{rank}" else signal.SIGSTOP)
        if mode == "suspended":
            time.sleep(4.0)  # in which a rank that was taken for lost would be told
        if mode == f"slow{rank}":
            time.sleep(2 * TIMEOUT)
        if mode == "twice1":
            time.sleep(3.0)  # until the other rank 1 has come, too
        if mode == f"hang{rank}":
            time.sleep(1000)
        dist.barrier()
    watch.close()
    print("passed", flush=True)
    os._exit(0)

def start(rank, port, mode, files):
    process = os.fork()
    if process == 0:
        for descriptor, file in zip((1, 2), files):
            os.dup2(file.fileno(), descriptor)
        rank_of(rank, port, mode)
    return process

def start_all(mode):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = {"missing1": [0, 2], "twice1": [0, 1, 1, 2]}.get(mode, range(WORLD))
    outputs = [[tempfile.NamedTemporaryFile() for _ in range(2)] for _ in started]
    return [(start(rank, port, mode, files), files) for rank, files in zip(started, outputs)]

def resume(processes):
    for process in processes:
        os.waitpid(process, os.WUNTRACED)
    time.sleep(2 * TIMEOUT)
    for process in processes:
        os.kill(process, signal.SIGCONT)

def run(modes):
    # Exit codes, outputs, and seconds to the last end, of the modes at the same time.
    groups = {mode: start_all(mode) for mode in modes}
    begun = time.monotonic()
    if "suspended" in groups:
        threading.Thread(target=resume, args=([process for process, _ in groups["suspended"]],)).start()
    stopped = {groups[mode][int(mode[4:])][0] for mode in modes if mode.startswith("stop")}
    left = {process for group in groups.values() for process, _ in group} - stopped
    ends, times = {}, {}
    while left and time.monotonic() - begun < SECONDS:
        for process in list(left):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                left.discard(process)
                ends[process], times[process] = os.waitstatus_to_exitcode(status), time.monotonic() - begun
        time.sleep(0.02)
    for process in left | stopped:  # one that the case has stopped stays so
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        ends[process] = "hangs"
    for mode, group in groups.items():
        told = [[ends[process], *(open(file.name).read() for file in files)] for process, files in group]
        results[mode] = [told, max(times.get(process, 0.0) for process, _ in group)]

results = {}
quick = [mode for mode in sys.argv[3:] if mode not in IDLE]
for pair in zip(quick[::2], quick[1::2] + [None]):
    run([mode for mode in pair if mode])
run([mode for mode in sys.argv[3:] if mode in IDLE])
print(json.dumps(results))
"""

Outcome = tuple[list[object], list[str], list[str]]


@pytest.fixture(scope="module")
def answer() -> dict[str, tuple[list[list[object]], float]]:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(TIMEOUT), str(STALL), *MODES],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "FATAL"},
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def outcomes(answer) -> dict[str, Outcome]:
    """For every mode: exit codes, standard outputs and standard errors of the ranks."""
    return {mode: tuple([list(column) for column in zip(*answer[mode][0], strict=True)]) for mode in MODES}


@pytest.fixture(scope="module")
def seconds(answer) -> dict[str, float]:
    """For every mode: how long its ranks took to end."""
    return {mode: answer[mode][1] for mode in MODES}


LINE = "exo-megatron: d.jsonl:3: bad; expected good; fix: mend\n"


def test_an_error_of_all_ranks_is_told_once(outcomes):
    codes, outs, errs = outcomes["all"]
    assert codes == [2, 2, 2]
    assert "".join(errs) == LINE
    assert "".join(outs) == ""


def test_try_again_later_is_the_exit_of_all(outcomes):
    codes, _, errs = outcomes["later"]
    assert codes == [75, 75, 75]
    assert "".join(errs).count("down") == 1


def test_different_errors_are_all_told(outcomes):
    codes, _, errs = outcomes["each"]
    assert codes == [2, 2, 2]
    assert [len(err.splitlines()) for err in errs] == [1, 1, 1]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_rank_ends_the_waiting_ones_with_its_code(outcomes, failing):
    codes, _, errs = outcomes[f"rank{failing}"]
    assert codes == [2, 2, 2]
    assert errs.pop(failing) == LINE
    for err in errs:
        assert len(err.splitlines()) == 1
        assert f"stopped because rank {failing} (" in err
        assert "d.jsonl:3: bad" in err


def test_a_crash_is_told_with_its_traceback_and_others_in_one_line(outcomes):
    codes, _, errs = outcomes["crash1"]
    assert codes == [1, 1, 1]
    assert errs[1].startswith("rank 1: Traceback")
    assert errs[1].endswith("ZeroDivisionError: by nought\n")
    for err in (errs[0], errs[2]):
        assert len(err.splitlines()) == 1
        assert "stopped because rank 1 (" in err
        assert "ZeroDivisionError: by nought" in err


def test_the_same_crash_of_all_has_one_traceback(outcomes):
    codes, _, errs = outcomes["crashes"]
    assert codes == [1, 1, 1]
    assert "".join(errs).count("Traceback") == 1


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_is_named_on_all_others(outcomes, seconds, lost):
    """By rank, node and what it was doing, whatever gloo says of the connection meanwhile."""
    codes, _, errs = outcomes[f"kill{lost}"]
    assert codes.pop(lost) == -9
    assert codes == [1, 1]
    assert errs.pop(lost) == ""
    for err in errs:
        assert_named(err, lost)
        assert "has ended without a word" in err
    assert seconds[f"kill{lost}"] < 10


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_named_on_all_others(outcomes, seconds, frozen):
    """SIGSTOP leaves its connections open. Rank 0 holds the store and the hub of the watch."""
    codes, _, errs = outcomes[f"stop{frozen}"]
    assert codes.pop(frozen) == "hangs"
    assert codes == [1, 1]
    errs.pop(frozen)
    for err in errs:
        assert_named(err, frozen)
        assert "no sign of life since 20" in err
        assert "runtime.timeout_seconds" in err
    assert TIMEOUT < seconds[f"stop{frozen}"] < TIMEOUT + 10


def assert_named(err: str, lost: int) -> None:
    assert len(err.splitlines()) == 1, err
    assert re.match(rf"exo-megatron: rank {lost} \({re.escape(socket.gethostname())}, process \d+\): ", err), err
    assert "it was in rehearsal, begun " in err


@pytest.mark.parametrize("mode", ["slow1", "suspended", "fine"])
def test_a_slow_rank_and_a_run_that_was_stopped_as_a_whole_go_on(outcomes, mode):
    """slow1: the main thread of a rank takes twice the timeout, and all others wait for it."""
    assert outcomes[mode] == ([0] * 3, ["passed\n"] * 3, [""] * 3)


def test_a_rank_that_hangs_is_named_once_nobody_goes_on(outcomes):
    """The others wait in a collective."""
    codes, _, errs = outcomes["hang1"]
    assert codes == [1, 1, 1]
    for err in errs:
        assert len(err.splitlines()) == 1
        assert err.startswith("exo-megatron: rank 1: no rank has gone on for ")
        assert "runtime.stall_seconds" in err


def test_a_rank_that_does_not_come_is_named(outcomes, seconds):
    codes, _, errs = outcomes["missing1"]
    assert codes == [1, 1]
    for err in errs:
        assert len(err.splitlines()) == 1
        assert err.startswith("exo-megatron: rank 1: did not come; the 2 of 3 ranks that did are on ")
    assert seconds["missing1"] < 15


def test_a_rank_that_comes_twice_is_refused(outcomes):
    """The world is that of the process which came first."""
    codes, outs, errs = outcomes["twice1"]
    assert sorted(codes) == [0, 0, 0, 2]
    refused = codes.index(2)
    assert refused in (1, 2)
    assert errs[refused].count("\n") == 1
    assert "another process was started as rank 1, too" in errs[refused]
    assert outs.count("passed\n") == 3


def test_ranks_of_different_worlds_are_refused(outcomes):
    codes, _, errs = outcomes["larger1"]
    assert codes == [2, 2, 2]
    assert all("was started for a world of 4, rank 0 for one of 3" in err for err in errs)
