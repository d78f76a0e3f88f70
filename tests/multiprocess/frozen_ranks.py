"""Freezes a rank of two in the middle of real stages, and looks at what the other one says and when it leaves.

    python -m tests.multiprocess.frozen_ranks [--at-once 2] [--json FILE] [LAYOUT-RANK-MOMENT ...]

Without names: all of dp, tp, pp x rank 0, 1 x training, rollout, saving. Ranks are forked from this process, which
has the imports. Ends with 1 if a survivor did not name the frozen rank in time, in one line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tests.multiprocess.align_case import reward_groups, write_records
from tests.multiprocess.harness import free_port, worker_environment
from tests.multiprocess.nursery import MODULES

LAYOUTS = {"dp": [], "tp": ["parallel.tensor=2"], "pp": ["parallel.pipeline=2"]}
MOMENTS = {
    "training": ("exo_megatron.training.trainer:train_step", 2, "align: step 2,"),
    "saving": ("exo_megatron.checkpoint.save:plan_writing", 1, "align: saving step 2,"),
    "rollout": ("exo_megatron.stages.rollout:draw_candidates", 1, "rollout: prompts 0 to 8,"),
}
"""Moment -> the function in which the rank freezes, at which call, and what it is said to have been doing."""

NAMES = ["-".join(map(str, each)) for each in product(LAYOUTS, (0, 1), MOMENTS)]
TIMEOUT = 6.0
START_SECONDS = 240.0
WORLD = 2


@dataclass(frozen=True)
class Outcome:
    """What the survivor did. `seconds`: from the freezing to its end."""

    name: str
    code: int | None
    seconds: float
    said: str

    @property
    def is_right(self) -> bool:
        """Whether it left in time and named the frozen rank and what that did, in one line and nothing else."""
        _, frozen, moment = self.name.split("-")
        lines = [line for line in self.said.splitlines() if "%" not in line]  # not those of the progress
        named = (
            rf"exo-megatron: rank {frozen} \({re.escape(socket.gethostname())}, process \d+\): gives no sign of life "
        )
        found = [line for line in lines if re.match(named, line) and MOMENTS[moment][2] in line]
        quiet = "Traceback" not in self.said and "Error" not in self.said
        return self.code == 1 and self.seconds < TIMEOUT + 10 and len(found) == 1 and quiet


def make_inputs(folder: Path) -> None:
    """A tiny policy, and groups with rewards, of which the prompts serve the rollout, too. In a process of its own."""

    def work() -> None:
        from tests.reference.tiny_llama import save_hf, tiny_config, tiny_llama

        save_hf(tiny_llama(tiny_config(), seed=31), folder / "hf")
        write_records(folder / "rewards.jsonl", reward_groups(seed=7), fields="rewards")
        _command(["import", f"hf={folder / 'hf'}", f"output={folder / 'policy'}"])

    _, status = os.waitpid(_fork(work, folder / "import.log", worker_environment(0, 1, 0)), 0)
    assert status == 0, (folder / "import.log").read_text()


def run(names: Sequence[str], folder: Path) -> list[Outcome]:
    """Run some combinations at the same time."""
    groups = {name: _start(name, folder) for name in names}
    frozen_at: dict[str, float] = {}
    outcomes: dict[str, Outcome] = {}
    deadline = time.monotonic() + START_SECONDS
    while len(outcomes) < len(names) and time.monotonic() < deadline:
        for name, processes in groups.items():
            frozen = int(name.split("-")[1])
            if name not in frozen_at and os.WIFSTOPPED(os.waitpid(processes[frozen], os.WNOHANG | os.WUNTRACED)[1]):
                frozen_at[name] = time.monotonic()
            if name not in outcomes:
                found, status = os.waitpid(processes[1 - frozen], os.WNOHANG)
                if found:
                    seconds = time.monotonic() - frozen_at.get(name, deadline)
                    said = _log(folder, name, 1 - frozen).read_text(errors="replace")
                    outcomes[name] = Outcome(name, os.waitstatus_to_exitcode(status), seconds, said)
        time.sleep(0.02)
    for name, processes in groups.items():
        frozen = int(name.split("-")[1])
        for process in processes if name not in outcomes else [processes[frozen]]:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    return [outcomes.get(name, Outcome(name, None, START_SECONDS, "it waits")) for name in names]


def _start(name: str, folder: Path) -> list[int]:
    layout, frozen, moment = name.split("-")
    data = [f"data.path={folder / 'rewards.jsonl'}", f"data.cache={folder / 'cache'}", f"output={folder / name}"]
    words = [f"model.checkpoint={folder / 'policy'}", *data, *LAYOUTS[layout], f"runtime.timeout_seconds={TIMEOUT}"]
    words += ["compute.precision=fp32", "compute.max_tokens_per_microbatch=60"]
    if moment == "rollout":
        command = ["rollout", *words, "sampling.max_new_tokens=4"]
    else:
        command = ["align", *words, "batch.groups=2", "batch.epochs=2", "save.interval=2"]
    port = free_port()

    def work(rank: int) -> None:
        if rank == int(frozen):
            _freeze_in(*MOMENTS[moment][:2])
        _command(command)

    environments = [worker_environment(rank, WORLD, port) for rank in range(WORLD)]
    return [_fork(lambda r=rank: work(r), _log(folder, name, rank), environments[rank]) for rank in range(WORLD)]


def _freeze_in(target: str, call: int) -> None:
    """Make the function stop this process at its call of this number, once a beat has told of it."""
    module, _, function = target.partition(":")
    namespace = vars(importlib.import_module(module))
    original, calls = namespace[function], iter(range(1, 1000))

    def freezing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            time.sleep(TIMEOUT / 3)
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(*args, **kwargs)

    namespace[function] = freezing


def _command(words: list[str]) -> None:
    from exo_megatron.cli.main import main

    code = main(words)
    if code:
        os._exit(code)


def _fork(work: Callable[[], None], log: Path, environment: dict[str, str]) -> int:
    process = os.fork()
    if process:
        return process
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ.clear()
    os.environ.update(environment)
    try:
        work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def _log(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name}.rank{rank}.log"


def main() -> int:
    """Run the combinations, print a line for each and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="default: all")
    parser.add_argument("--at-once", type=int, default=2, help="combinations at the same time")
    parser.add_argument("--json", type=Path, help="also write the outcomes to this file")
    arguments = parser.parse_args()
    importlib.import_module("exo_megatron.parallel.cpu_backend").install()
    for module in (*MODULES, "exo_megatron.stages.rollout"):
        importlib.import_module(module)
    names, outcomes = arguments.names or NAMES, []
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        for first in range(0, len(names), arguments.at_once):
            for each in run(names[first : first + arguments.at_once], Path(folder)):
                outcomes.append(each)
                verdict = "named" if each.is_right else f"WRONG (exit {each.code}): {each.said[-1500:]}"
                print(f"{each.name:16} {each.seconds:6.1f} s  {verdict}", flush=True)
    right = sum(each.is_right for each in outcomes)
    print(f"{right} of {len(outcomes)}: the survivor named the frozen rank within {TIMEOUT:.0f} + 10 s and left")
    if arguments.json:
        rows = [asdict(each) | {"is_right": each.is_right} for each in outcomes]
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if right == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
