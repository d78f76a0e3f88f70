"""Functions that run one stage, or a workflow in one distributed job without complete stages."""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
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
from exo_megatron.parallel.ending import leaving_together, on_main
from exo_megatron.parallel.runtime import Runtime, distributed_runtime
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


def run_stage(stage: str, config: StageConfig) -> None:
    """Join the world of the launcher and run one stage in it."""
    digest = config_digest(config)
    with distributed_runtime() as runtime, leaving_together(runtime):
        check_agreement(digest, runtime)
        digest = on_main(runtime, lambda: with_steps(config, digest))
        if on_main(runtime, lambda: is_complete(config, digest)):
            done = f"complete already in {config.output} with this configuration (inputs are not compared)"
            say(runtime, f"{stage}: {done}, nothing to do; remove it to run it again")
        else:
            execute_stage(stage, stage, config, digest, runtime)


def execute_stage(name: str, stage: str, config: StageConfig, digest: str, runtime: Runtime) -> None:
    """Write `config.yaml`, do the stage's work on all ranks, and write `stage.json`.

    Collective over the world.

    Args:
        name: name of the stage in the lines printed on rank 0.
        stage: kind of the stage.
        config: its configuration.
        digest: identifies the configuration in the files written.
        runtime: the world.
    """
    text = render_config(config)
    clean = partial(remove_leftovers, config.output, status_directory(config))
    on_main(runtime, lambda: writing(config.output, clean))
    begin = partial(begin_stage, status_directory(config), stage, config_text=text, digest=digest)
    on_main(runtime, lambda: writing(config.output, begin))
    say(runtime, f"{name}: started, output in {config.output}")
    started = time.monotonic()
    with reporting_all(config.output):
        load_function(STAGE_FUNCTIONS[stage])(config, runtime)
    runtime.barrier()
    on_main(runtime, lambda: writing(config.output, partial(complete_stage, status_directory(config), stage, digest)))
    say(runtime, f"{name}: done in {show_duration(time.monotonic() - started)}")


def run_conversion(config: ImportConfig | ExportConfig) -> int:
    """Convert like the stage, without its files (for `tools/`), and return the exit code."""
    stage = "import" if isinstance(config, ImportConfig) else "export"
    with distributed_runtime(models=config.verify) as runtime, leaving_together(runtime):
        check_agreement(config_digest(config), runtime)
        load_function(STAGE_FUNCTIONS[stage])(config, runtime)
        say(runtime, f"wrote {config.output}")
    return 0


def run_prepare(config: StageConfig) -> int:
    """Join the world of the launcher, tokenise the data of a stage and return the exit code."""
    with distributed_runtime(models=False) as runtime, leaving_together(runtime):
        check_agreement(config_digest(config), runtime)
        with reporting_all(config.output):
            load_function("exo_megatron.stages.prepare:prepare_data")(config, runtime)
    return 0


def run_verify(config: VerifyConfig) -> int:
    """Join the world of the launcher, verify a conversion and return the exit code."""
    with distributed_runtime(models=not config.tensors_only) as runtime, leaving_together(runtime):
        code: int = load_function("exo_megatron.stages.verify:verify")(config, runtime)
    return code


def check_agreement(digest: str, runtime: Runtime) -> None:
    """Raise ConfigError on all ranks if they were started with different settings or versions.

    Collective over the world.
    """
    seen = runtime.gather_objects((digest, __version__))
    on_main(runtime, lambda: _compare(seen or []))


def run_workflow(workflow: Workflow) -> None:
    """Join the world of the launcher and run the stages in it."""
    text = workflow.render()
    with distributed_runtime() as runtime, leaving_together(runtime):
        check_agreement(hashlib.sha256(text.encode("utf-8")).hexdigest(), runtime)
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
    kept = on_main(runtime, lambda: writing(output, lambda: _make_way(stage, workflow)))
    if kept is not None:
        say(runtime, f"{stage.name}: its configuration or inputs changed; the earlier output is kept in {kept}")
    execute_stage(stage.name, stage.stage, stage.config, stage.digest, runtime)
    _free_memory(runtime)


def _make_way(stage: PlannedStage, workflow: Workflow) -> Path | None:
    """Mark downstream stages as stale, and move stale output away; returns its new path, if any."""
    for each in workflow.downstream(stage.name):
        mark_stale(status_directory(each.config))
    status = status_directory(stage.config)
    if started_digest(status) in (None, stage.digest):
        return None
    # The output first: without its status nothing would say whose it is.
    kept = set_aside(stage.config.output) if stage.config.output.exists() else None
    if status != stage.config.output:
        set_aside(status)
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


def _compare(seen: Sequence[tuple[str, str]]) -> None:
    for rank, each in enumerate(seen):
        if each != seen[0]:
            what = "configuration" if each[0] != seen[0][0] else "version of exo-megatron"
            raise ConfigError(
                f"rank {rank}",
                f"its {what} differs from that of rank 0",
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
    try:
        record = read_json(path)
    except DataError:
        return None
    if not isinstance(record, dict) or record.get("status", "complete") != "complete":
        return None
    digest = record.get("config_digest")
    return digest if isinstance(digest, str) else None
