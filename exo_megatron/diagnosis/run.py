"""The run of `doctor --gpu`: joins the world, runs the checks in a time, tells what they found."""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from exo_megatron.diagnosis.checklist import SIZES, correctness_checks, speed_checks
from exo_megatron.diagnosis.checks import DeviceCheck, Result, failure, run_check
from exo_megatron.diagnosis.environment import describe_environment
from exo_megatron.diagnosis.machine import measure_machine
from exo_megatron.diagnosis.report import Environment, conclude, introduce, show_result, write_results
from exo_megatron.diagnosis.site import Site
from exo_megatron.diagnosis.small_models import SmallSizes, make_small_model
from exo_megatron.errors import ConfigError
from exo_megatron.models.policy import DTYPES
from exo_megatron.parallel.ending import failing_together, on_main
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.utils.progress import Progress


def diagnose(runtime: Runtime, *, minutes: float, json: Path | None) -> int:
    """Run the checks that fit into the time, and print each result on rank 0.

    Collective over the world. Returns exit code 0 if none failed, else 1. json: file for the
    results, if any. Raises ConfigError if it cannot be written.
    """
    deadline = time.monotonic() + 60 * minutes
    record = Record(runtime, describe_environment(runtime), json)
    record.begin()
    with shared_directory(runtime) as directory:
        sizes = SIZES[runtime.device.type]
        machine = runtime.broadcast_object(measure_machine(runtime.device, DTYPES[sizes.speed.precision]))
        site = make_site(runtime, directory, sizes.small)
        checks = [*correctness_checks(site, sizes), *speed_checks(runtime, sizes, machine)]
        results = run_all(checks, record, deadline)
    return int(any(result.verdict == "failed" for result in results))


@contextmanager
def shared_directory(runtime: Runtime) -> Iterator[Path]:
    """Make a temporary directory that all ranks see, and remove it afterwards.

    Collective over the world. Raises ConfigError on all ranks if some rank does not see it.
    """
    directory = Path(on_main(runtime, lambda: tempfile.mkdtemp(prefix="exo-doctor-")))
    try:
        with failing_together():
            if not directory.is_dir():
                raise ConfigError(
                    f"rank {runtime.rank}",
                    f"does not see {directory}, which rank 0 has made",
                    expected="a directory for temporary files that all nodes share",
                    fix="set TMPDIR to a directory of a shared file system, on all nodes",
                )
        yield directory
    finally:
        if runtime.is_main:
            shutil.rmtree(directory, ignore_errors=True)


def make_site(runtime: Runtime, directory: Path, sizes: SmallSizes) -> Site:
    """Make the small models in a directory that all ranks see. Collective over the world."""
    dense, experts = (make_small_model(directory, sizes, runtime, experts=experts) for experts in (False, True))
    return Site(runtime, directory, dense, experts)


@dataclass(frozen=True)
class Record:
    """The output of rank 0, printed and written. json: file for the results, if any."""

    runtime: Runtime
    environment: Environment
    json: Path | None

    def begin(self) -> None:
        """Print the environment and write the file without results: on all ranks, in one call."""
        if self.runtime.is_main:
            print(introduce(self.environment), end="\n\n", flush=True)
        on_main(self.runtime, lambda: self._write(()))

    def add(self, results: Sequence[Result]) -> None:
        """Print the newest result and write all. Not collective."""
        if self.runtime.is_main:
            print(show_result(results[-1]), flush=True)
            self._write(results)

    def end(self, results: Sequence[Result]) -> None:
        """Print the verdicts in one line."""
        if self.runtime.is_main:
            print(f"\n{conclude(results)}", flush=True)

    def _write(self, results: Sequence[Result]) -> None:
        if self.json is not None:
            write_results(self.json, self.environment, results)


def run_all(checks: Sequence[DeviceCheck], record: Record, deadline: float) -> list[Result]:
    """Run all checks in turn. Collective over the world.

    With several processes a check that raises on this rank is recorded, if this is rank 0, and ends
    the run, because the others may be waiting in a collective.
    """
    results: list[Result] = []
    with Progress("doctor", len(checks), "checks", enabled=record.runtime.is_main) as progress:
        for check in checks:
            try:
                results.append(run_check(check, record.runtime, deadline))
            except Exception as error:
                found = failure(error)
                record.add([*results, Result(check.name, found.verdict, found.seen, found.expected, 0.0)])
                raise RuntimeError(f"the check {check.name!r} raised an exception") from error
            record.add(results)
            progress.advance(1, last=check.name)
            _free_memory(record.runtime)
    record.end(results)
    return results


def _free_memory(runtime: Runtime) -> None:
    """Free the memory of a check's models, for the next one."""
    gc.collect()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
