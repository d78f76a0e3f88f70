"""Functions that run one stage, or a workflow in one distributed job without complete stages."""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from exo_megatron import __version__
from exo_megatron.checkpoint.directory import list_steps
from exo_megatron.checkpoint.publish import remove_leftovers
from exo_megatron.config.document import config_digest, render_config
from exo_megatron.config.stages import (
    COMPLETE_FILE,
    CONFIG_FILE,
    STARTED_FILE,
    EvaluateConfig,
    ExportConfig,
    ImportConfig,
    StageConfig,
    VerifyConfig,
    status_directory,
)
from exo_megatron.config.workflow import PlannedStage, Workflow
from exo_megatron.errors import ConfigError, DataError
from exo_megatron.evaluation.estimates import REFERENCE_NAME
from exo_megatron.parallel.ending import on_main
from exo_megatron.parallel.runtime import Runtime, distributed_runtime
from exo_megatron.stages.lock import OutputLock
from exo_megatron.stages.memory import out_of_memory
from exo_megatron.utils.disk import reporting, reporting_all
from exo_megatron.utils.files import read_json, write_json, write_text
from exo_megatron.utils.progress import show_duration

T = TypeVar("T")

STAGE_FUNCTIONS = {
    "import": "exo_megatron.stages.import_hf:run_import",
    "sft": "exo_megatron.stages.sft:run_sft",
    "rollout": "exo_megatron.stages.rollout:run_rollout",
    "score": "exo_megatron.stages.score:run_score",
    "align": "exo_megatron.stages.align:run_align",
    "evaluate": "exo_megatron.stages.evaluate:run_evaluate",
    "export": "exo_megatron.stages.export_hf:run_export",
}
"""Stage -> its function.

Each is imported only when the stage runs, because it brings torch and more with it.
"""

RUN_FILE = "run.yaml"

COMPUTING_LIBRARIES = ("torch", "megatron-core", "transformers", "numpy")
"""Libraries that take part in what ranks compute together."""


def run_stage(stage: str, config: StageConfig) -> None:
    """Join the world of the launcher and run one stage in it."""
    digest = config_digest(config)
    with distributed_runtime(config.runtime) as runtime:
        check_agreement(digest, runtime)
        digest = on_main(runtime, lambda: with_steps(config, digest))
        if on_main(runtime, lambda: is_complete(config, digest)):
            done = f"complete already in {config.output} with this configuration (inputs are not compared)"
            say(runtime, f"{stage}: {done}, nothing to do; remove it to run it again")
            return
        with one_run(status_directory(config), runtime):
            execute_stage(stage, stage, config, digest, runtime)


@contextmanager
def one_run(directory: Path, runtime: Runtime) -> Iterator[OutputLock]:
    """Hold the lock of an output directory on rank 0 during a block. Collective over the world.

    Raises OutputInUse on all ranks if another run holds it.
    """
    lock = OutputLock(directory)
    on_main(runtime, lambda: writing(directory, lock.acquire))
    try:
        yield lock
    finally:
        lock.release()


def execute_stage(name: str, stage: str, config: StageConfig, digest: str, runtime: Runtime) -> None:
    """Write `config.yaml`, do the stage's work on all ranks, and write `stage.json`.

    Collective over the world.

    Args:
        name: name of the stage in the lines printed on rank 0.
        stage: kind of the stage.
        config: its configuration.
        digest: identifies the configuration in the files written.
        runtime: the world.

    Raises:
        DeviceMemoryError: there is not enough memory for what the stage does at once; and what the stage raises.
    """
    runtime.begin(f"{name}: start")
    text = render_config(config)
    clean = partial(remove_leftovers, config.output, status_directory(config))
    on_main(runtime, lambda: writing(config.output, clean))
    begin = partial(begin_stage, status_directory(config), stage, config_text=text, digest=digest)
    on_main(runtime, lambda: writing(config.output, begin))
    say(runtime, f"{name}: started, output in {config.output}")
    started = time.monotonic()
    try:
        with reporting_all(config.output):
            load_function(STAGE_FUNCTIONS[stage])(config, runtime)
    except (RuntimeError, MemoryError) as error:
        raise out_of_memory(error, config, runtime) or error from None
    runtime.begin(f"{name}: end")
    runtime.barrier()
    on_main(runtime, lambda: writing(config.output, partial(complete_stage, status_directory(config), stage, digest)))
    say(runtime, f"{name}: done in {show_duration(time.monotonic() - started)}")


def run_conversion(config: ImportConfig | ExportConfig) -> int:
    """Convert like the stage, without its files (for `tools/`), and return the exit code."""
    stage = "import" if isinstance(config, ImportConfig) else "export"
    with distributed_runtime(config.runtime, models=config.verify) as runtime:
        check_agreement(config_digest(config), runtime)
        load_function(STAGE_FUNCTIONS[stage])(config, runtime)
        say(runtime, f"wrote {config.output}")
    return 0


def run_prepare(config: StageConfig) -> int:
    """Join the world of the launcher, tokenise the data of a stage and return the exit code."""
    with distributed_runtime(config.runtime, models=False) as runtime:
        check_agreement(config_digest(config), runtime)
        with reporting_all(config.output):
            load_function("exo_megatron.stages.prepare:prepare_data")(config, runtime)
    return 0


def run_verify(config: VerifyConfig) -> int:
    """Join the world of the launcher, verify a conversion and return the exit code."""
    with distributed_runtime(config.runtime, models=not config.tensors_only) as runtime:
        code: int = load_function("exo_megatron.stages.verify:verify")(config, runtime)
    return code


def check_agreement(digest: str, runtime: Runtime) -> None:
    """Raise ConfigError on all ranks if they were started with different settings, code or libraries.

    Collective over the world.
    """
    if runtime.world_size > 1:
        seen = runtime.gather_objects({"configuration": digest, **program_versions()})
        on_main(runtime, lambda: _compare(seen or []))


def program_versions() -> dict[str, str]:
    """Return what must be the same on all ranks besides the settings: versions, and a digest of our own code."""
    code = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        code.update(str(file.relative_to(package)).encode() + file.read_bytes())
    libraries = {f"version of {name}": version(name) for name in COMPUTING_LIBRARIES}
    return {
        "version of exo-megatron": __version__,
        "code of exo-megatron": code.hexdigest(),
        "version of Python": ".".join(platform.python_version_tuple()[:2]),
        **libraries,
    }


def run_workflow(workflow: Workflow) -> None:
    """Join the world of the launcher and run the stages in it."""
    text = workflow.render()
    with distributed_runtime(workflow.runtime) as runtime:
        check_agreement(hashlib.sha256(text.encode("utf-8")).hexdigest(), runtime)
        with one_run(workflow.output, runtime):
            on_main(runtime, lambda: writing(workflow.output, lambda: _write_workflow(workflow.output, text)))
            for stage in workflow.stages:
                run_planned_stage(stage, workflow, runtime)


def _write_workflow(output: Path, text: str) -> None:
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output, output)
    write_text(output / RUN_FILE, text)


def run_planned_stage(stage: PlannedStage, workflow: Workflow, runtime: Runtime) -> None:
    """Run a stage unless it is complete with this configuration and these upstream stages.

    Collective over the world. A stage that was interrupted is resumed in its directory. Output that
    another configuration left there is set aside. Stages downstream lose their completion before
    this one starts, so that they run again even if the run is interrupted in between.
    """
    output = stage.config.output
    stage = replace(stage, digest=on_main(runtime, lambda: with_steps(stage.config, stage.digest)))
    if on_main(runtime, lambda: is_complete(stage.config, stage.digest)):
        say(runtime, f"{stage.name}: complete already, skipped")
        return
    with one_run(status_directory(stage.config), runtime) as lock:
        kept = on_main(runtime, lambda: writing(output, lambda: _make_way(stage, workflow, lock)))
        if kept is not None:
            say(runtime, f"{stage.name}: its configuration or inputs changed; the earlier output is kept in {kept}")
        execute_stage(stage.name, stage.stage, stage.config, stage.digest, runtime)
    _free_memory(runtime)


def _make_way(stage: PlannedStage, workflow: Workflow, lock: OutputLock) -> Path | None:
    """Mark downstream stages as stale, and move stale output away; returns its new path, if any.

    The lock is in the directory of the stage's status, and goes with it.
    """
    for each in workflow.downstream(stage.name):
        mark_stale(status_directory(each.config))
    status = status_directory(stage.config)
    if started_digest(status) in (None, stage.digest):
        return None
    if status == stage.config.output:
        return lock.move_away(lambda: set_aside(status))
    # The output first: without its status nothing would say whose it is.
    kept = set_aside(stage.config.output) if stage.config.output.exists() else None
    lock.move_away(lambda: set_aside(status))
    return kept


def _free_memory(runtime: Runtime) -> None:
    """Free the memory of a stage's model; modules and their hooks refer to each other in cycles."""
    gc.collect()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()


def writing(output: Path, work: Callable[[], T]) -> T:
    """Run work on a stage's output directory; failures of the file system become StorageError."""
    with reporting(output):
        return work()


def load_function(target: str) -> Callable[[Any, Runtime], Any]:
    """Import the function that `package.module:name` stands for."""
    module, _, name = target.partition(":")
    function: Callable[[Any, Runtime], Any] = getattr(importlib.import_module(module), name)
    return function


def say(runtime: Runtime, text: str) -> None:
    """Print a line on rank 0."""
    if runtime.is_main:
        print(text, flush=True)


def _compare(seen: Sequence[Mapping[str, str]]) -> None:
    for rank, each in enumerate(seen):
        for what, found in seen[0].items():
            if each[what] == found:
                continue
            values = f" ({each[what]}, not {found})" if what.startswith("version") else ""
            raise ConfigError(
                f"rank {rank}",
                f"its {what} differs from that of rank 0{values}",
                expected="the same on all ranks",
                fix="start all ranks with the same files and settings",
            )


def begin_stage(output: Path, stage: str, *, config_text: str, digest: str) -> None:
    """Write `config.yaml` and remove the mark of completion. Called by one process.

    Args:
        output: directory of the stage.
        stage: kind of the stage.
        config_text: the resolved configuration, as YAML.
        digest: of the configuration and, in a `run`, of the stages that it depends on.
    """
    output.mkdir(parents=True, exist_ok=True)
    withdraw_completion(output)
    write_text(output / CONFIG_FILE, config_text)
    write_json(output / STARTED_FILE, {"stage": stage, "config_digest": digest})


def complete_stage(output: Path, stage: str, digest: str) -> None:
    """Write `stage.json`, the last file of the stage.

    Called by one process, after all have ended their work.
    """
    write_json(output / COMPLETE_FILE, {"stage": stage, "status": "complete", "config_digest": digest})


def withdraw_completion(output: Path) -> None:
    """Remove the mark of completion, so that a stage counts as incomplete."""
    (output / COMPLETE_FILE).unlink(missing_ok=True)


def mark_stale(output: Path) -> None:
    """Mark a directory that was begun as belonging to inputs that have changed."""
    withdraw_completion(output)
    if (output / STARTED_FILE).exists():
        write_json(output / STARTED_FILE, {"stage": None, "config_digest": "stale"})


def set_aside(output: Path) -> Path:
    """Rename a directory to `NAME.old-N` with the first free N, and return the new path."""
    number = 1
    while (kept := output.with_name(f"{output.name}.old-{number}")).exists():
        number += 1
    output.rename(kept)
    return kept


def is_complete(config: StageConfig, digest: str) -> bool:
    """Tell whether the output is there and was completed with this digest.

    An export's status outlives its output.
    """
    return completed_digest(status_directory(config)) == digest and config.output.is_dir()


def started_digest(status: Path) -> str | None:
    """Read the digest that a stage was begun with; None for a missing or damaged file."""
    return _digest(status / STARTED_FILE)


def completed_digest(status: Path) -> str | None:
    """Read the digest that a stage was completed with; None for a missing or damaged file."""
    return _digest(status / COMPLETE_FILE)


def with_steps(config: StageConfig, digest: str) -> str:
    """Return the digest that an evaluation is recorded with; the given one for every other stage.

    It depends on the steps that the evaluated training outputs hold, and on the newest step of the
    reference, so that an evaluation runs again when there are new ones.
    """
    if not isinstance(config, EvaluateConfig):
        return digest
    found = {name: [step for step, _ in list_steps(path)] for name, path in config.models.items()}
    found[REFERENCE_NAME] = [step for step, _ in list_steps(config.reference.checkpoint)[-1:]]
    if not any(found.values()):
        return digest
    return config_digest(config, {"configuration": digest, "steps": json.dumps(found, sort_keys=True)})


def _digest(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        record = read_json(path)
    except DataError:
        return None
    if not isinstance(record, dict) or record.get("status", "complete") != "complete":
        return None
    digest = record.get("config_digest")
    return digest if isinstance(digest, str) else None
