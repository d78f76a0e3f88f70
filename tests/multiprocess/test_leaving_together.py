"""How a world ends when a rank fails: every rank gets the same exit, nobody waits, and each message is told once.

One process imports torch and forks the two ranks of every case, so that a case takes a second. The ranks use torch's
own gloo group and a stand-in for the runtime. Rank 0 holds the store, as under srun and mpirun.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODES = ["all", "later", "each", "rank0", "rank1", "crash1", "crashes", "kill1", "fine"]
DRIVER = """
import json, os, signal, socket, sys, tempfile, time
from types import SimpleNamespace
import torch.distributed as dist
from exo_megatron.errors import DataError, TryAgainLater
from exo_megatron.parallel import ending
from exo_megatron.parallel.ending import leaving_together

WORLD = 2
SECONDS = 60

def rank_of(rank, port, mode):
    store = dist.TCPStore("127.0.0.1", port, WORLD, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    with leaving_together(SimpleNamespace(rank=rank, world_size=WORLD, is_main=rank == 0)):
        dist.barrier()
        if mode in ("all", f"rank{rank}"):
            raise DataError("d.jsonl:3", "bad", expected="good", fix="mend")
        if mode == "later":
            raise TryAgainLater("x", "down", expected="up", fix="wait")
        if mode == "each":
            raise DataError(f"d.jsonl:{rank}", "bad", expected="good", fix="mend")
        if mode in ("crashes", f"crash{rank}"):
            raise ZeroDivisionError("by nought")
        if mode == f"kill{rank}":
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()
    print("passed", flush=True)
    os._exit(0)

def start(rank, port, mode, files):
    process = os.fork()
    if process == 0:
        for descriptor, file in zip((1, 2), files):
            os.dup2(file.fileno(), descriptor)
        rank_of(rank, port, mode)
    return process

def end(process, files, deadline):
    while (status := os.waitpid(process, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    if status[0] == 0:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return ["hangs", "", ""]
    return [os.waitstatus_to_exitcode(status[1]), *(open(file.name).read() for file in files)]

results = {}
for mode in sys.argv[1:]:
    # Rank 0 waits for rank 1 to fail too, however slow the machine is, but where that never happens.
    ending.LINGER_SECONDS = 1 if mode in ("rank0", "kill1") else SECONDS / 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outputs = [[tempfile.NamedTemporaryFile() for _ in range(2)] for _ in range(WORLD)]
    processes = [start(rank, port, mode, outputs[rank]) for rank in range(WORLD)]
    deadline = time.monotonic() + SECONDS
    results[mode] = [end(*each, deadline) for each in zip(processes, outputs)]
print(json.dumps(results))
"""

Outcome = tuple[list[object], list[str], list[str]]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """For every mode: exit codes, standard outputs and standard errors of the ranks."""
    answer = subprocess.run(
        [sys.executable, "-c", DRIVER, *MODES],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "FATAL"},
        timeout=500,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    ranks = json.loads(answer.stdout)
    return {mode: tuple([list(column) for column in zip(*ranks[mode], strict=True)]) for mode in MODES}


LINE = "exo-megatron: d.jsonl:3: bad; expected good; fix: mend\n"


def test_an_error_of_all_ranks_is_told_once(outcomes):
    codes, outs, errs = outcomes["all"]
    assert codes == [2, 2]
    assert "".join(errs) == LINE
    assert "".join(outs) == ""


def test_try_again_later_is_the_exit_of_all(outcomes):
    codes, _, errs = outcomes["later"]
    assert codes == [75, 75]
    assert "".join(errs).count("down") == 1


def test_different_errors_are_all_told(outcomes):
    codes, _, errs = outcomes["each"]
    assert codes == [2, 2]
    assert [len(err.splitlines()) for err in errs] == [1, 1]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_rank_ends_the_waiting_ones(outcomes, failing):
    codes, _, errs = outcomes[f"rank{failing}"]
    assert codes[failing] == 2
    assert errs[failing] == LINE
    # The other was in a collective; rank 0 keeps the store, so rank 1's failure gives rank 0 the same code.
    assert codes[1 - failing] == (2 if failing == 1 else 1)
    assert len(errs[1 - failing].splitlines()) == 1
    assert f"rank {1 - failing}: stopped because rank {failing}" in errs[1 - failing]


def test_a_crash_is_told_with_its_traceback_and_others_in_one_line(outcomes):
    codes, _, errs = outcomes["crash1"]
    assert codes == [1, 1]
    assert errs[1].startswith("rank 1: Traceback")
    assert errs[1].endswith("ZeroDivisionError: by nought\n")
    assert len(errs[0].splitlines()) == 1
    assert "rank 0: stopped because rank 1 failed" in errs[0]


def test_the_same_crash_of_all_has_one_traceback(outcomes):
    codes, _, errs = outcomes["crashes"]
    assert codes == [1, 1]
    assert "".join(errs).count("Traceback") == 1


def test_a_killed_rank_ends_the_others(outcomes):
    codes, _, errs = outcomes["kill1"]
    assert codes == [1, -9]
    assert "Traceback" in errs[0]


def test_without_a_failure_nothing_happens(outcomes):
    codes, outs, errs = outcomes["fine"]
    assert (codes, outs, errs) == ([0, 0], ["passed\n", "passed\n"], ["", ""])
