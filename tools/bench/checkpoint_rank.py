"""One rank of `python -m tools.bench checkpoint`: trains, saves, loads, and writes down what that took."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from exo_megatron.checkpoint.directory import step_directory, tokenizer_path
from exo_megatron.checkpoint.dist_format import Writing
from exo_megatron.checkpoint.load import load_model, load_sharded, verify_but_records
from exo_megatron.checkpoint.save import SmallFiles, begin_save
from exo_megatron.config.sections import ComputeConfig, LossConfig, ParallelConfig
from exo_megatron.data.groups import Group
from exo_megatron.diagnosis.work import Lengths
from exo_megatron.execution.policy import Policy
from exo_megatron.parallel.runtime import Runtime, distributed_runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.training.objectives import AlignObjective
from exo_megatron.training.optimizer import Trainee, make_trainee
from exo_megatron.training.saver import Saver
from exo_megatron.training.step import plan_step, train_step
from tools.bench.models import random_groups
from tools.bench.training import ADAM, LEARNING_RATE

SAVES, STEPS_BEFORE, WARM_UP = 3, 8, 2
LENGTHS = Lengths(32, (16, 16, 16, 16))
GROUPS = 2


def main(folder: Path, slow: float) -> None:
    """Measure this rank, with the model in the folder, and write `rankN.json` there."""
    compute = ComputeConfig(precision="fp32")
    with distributed_runtime() as runtime, model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        trainees = [
            make_trainee(Policy(load_model(folder / "model", topology, compute), topology, compute), ADAM)
            for _ in range(2)
        ]
        figures, saved = _saved(trainees[0], folder, runtime, slow)
        figures |= _loaded(trainees[1], saved, folder)
        (folder / f"rank{runtime.rank}.json").write_text(json.dumps(figures))


def _saved(
    trainee: Trainee, folder: Path, runtime: Runtime, slow: float
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Save three times, the last one by a slow writer while steps go on. Returns figures and what was saved last."""
    groups = [replace(group, reference_logprobs=(-100.0,) * 4) for group in random_groups([LENGTHS] * GROUPS, 1000)]
    objective = AlignObjective.of(LossConfig())
    small = SmallFiles(trainee.policy.spec, tokenizer_path(folder / "model"), {"step": 1})
    _steps(trainee, groups, objective, WARM_UP)
    before = _steps(trainee, groups, objective, STEPS_BEFORE)
    saver = Saver(lambda: None)
    copies, blocked, saved = [], [], {}
    during: list[float] = []
    written = _io("wchar")
    for number in range(SAVES):
        runtime.barrier()
        copies.append(_seconds(lambda: [shard.data.clone() for shard in _shards(trainee)]))
        runtime.barrier()
        began = time.monotonic()
        save = begin_save(
            step_directory(folder / "checkpoints", 1),
            trainee.sharded_state(loading=False),
            small,
            step=1,
            kind="training",
            runtime=runtime,
            snapshot=True,
        )
        blocked.append(time.monotonic() - began)
        if number == SAVES - 1:
            saved = {name: shard.data.clone() for name, shard in _named(trainee).items()}
            with _slowed(slow):
                saver.begin(save)
                during = _steps_while(trainee, groups, objective, saver, runtime)
        else:
            saver.begin(save)
        saver.end()
        if number == 0:
            written = _io("wchar") - written
    share = sum(shard.data.nbytes for shard in _shards(trainee))
    figures = {"share": share, "copy": copies, "blocked": blocked, "before": before, "during": during}
    return {**figures, "written": written}, saved


def _loaded(trainee: Trainee, saved: dict[str, torch.Tensor], folder: Path) -> dict[str, Any]:
    """Load into another model. equal: weights and state are those that were saved, bit for bit."""
    path = step_directory(folder / "checkpoints", 1)
    state = trainee.sharded_state(loading=True)
    read = _io("rchar")
    with _largest_memory() as memory:
        records = verify_but_records(path)
        trainee.load_state(load_sharded(path, state, records))
    found = _named(trainee)
    equal = found.keys() == saved.keys() and all(torch.equal(found[name].data, saved[name]) for name in saved)
    return {"read": _io("rchar") - read, "peak": memory(), "equal": equal}


def _steps(trainee: Trainee, groups: Sequence[Group], objective: AlignObjective, count: int) -> list[float]:
    return [_seconds(lambda: _step(trainee, groups, objective)) for _ in range(count)]


def _step(trainee: Trainee, groups: Sequence[Group], objective: AlignObjective, *, writing: bool = False) -> bool:
    batches = plan_step(trainee, groups, objective)
    step = train_step(trainee, batches.microbatches, objective, learning_rate=LEARNING_RATE, writing=writing)
    return step.writing


def _steps_while(
    trainee: Trainee, groups: Sequence[Group], objective: AlignObjective, saver: Saver, runtime: Runtime
) -> list[float]:
    """Time the steps until no rank writes any more."""
    times, writing = [], True
    while writing:
        began = time.monotonic()
        writing = _step(trainee, groups, objective, writing=saver.writing)
        times.append(time.monotonic() - began)
    return times


def _named(trainee: Trainee) -> dict[str, Any]:
    shards: dict[str, Any] = trainee.sharded_state(loading=False)["optimizer"]["param_state"]
    return shards


def _shards(trainee: Trainee) -> list[Any]:
    return list(_named(trainee).values())


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _io(name: str) -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@contextmanager
def _slowed(seconds: float) -> Iterator[None]:
    write = Writing.write

    def slow(self: Writing) -> None:
        write(self)
        time.sleep(seconds)

    of_class: Any = Writing
    of_class.write = slow
    try:
        yield
    finally:
        of_class.write = write


@contextmanager
def _largest_memory() -> Iterator[Callable[[], int]]:
    """Sample the private memory (USS) of this process in a thread; the function returns how much it grew at most."""
    process, end = psutil.Process(), threading.Event()
    first = largest = process.memory_full_info().uss

    def sample() -> None:
        nonlocal largest
        while not end.wait(0.02):
            largest = max(largest, process.memory_full_info().uss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    yield lambda: largest - first
    end.set()
    thread.join()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), float(sys.argv[2]))
