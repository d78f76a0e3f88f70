"""Runs one stage: its marks in the output directory, its function, and what rank 0 does for all."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from exo_megatron import __version__
from exo_megatron.config.dump import config_digest, render_config
from exo_megatron.config.stages import StageConfig
from exo_megatron.errors import ConfigError, ExoError
from exo_megatron.utils.progress import show_duration
from exo_megatron.utils.stages import begin_stage, complete_stage

if TYPE_CHECKING:
    from exo_megatron.parallel.runtime import Runtime

T = TypeVar("T")

STAGE_FUNCTIONS = {
    "import": "exo_megatron.cli.convert:run_import",
    "sft": "exo_megatron.training.sft:run_sft",
    "rollout": "exo_megatron.rollout.stage:run_rollout",
    "score": "exo_megatron.rewards.stage:run_score",
    "align": "exo_megatron.training.align:run_align",
    "evaluate": "exo_megatron.evaluation.stage:run_evaluate",
    "export": "exo_megatron.cli.convert:run_export",
}
"""Imported only when the stage runs, because each brings torch and more with it."""


def run_stage(stage: str, config: StageConfig) -> None:
    """Join the world of the launcher and run one stage in it."""
    from exo_megatron.cli.failure import leaving_together
    from exo_megatron.parallel.runtime import distributed_runtime

    digest = config_digest(config)
    with distributed_runtime() as runtime, leaving_together(runtime):
        check_agreement(digest, runtime)
        execute_stage(stage, stage, config, digest, runtime)


def execute_stage(name: str, stage: str, config: StageConfig, digest: str, runtime: Runtime) -> None:
    """Write `config.yaml`, do the stage's work on all ranks, and write `stage.json`. Collective over the world.

    name: what the stage is called in the lines printed on rank 0. digest: goes into the marks.
    """
    text = render_config(config)
    begin = partial(begin_stage, config.output, stage, config_text=text, digest=digest)
    on_main(runtime, lambda: writing(config.output, begin))
    say(runtime, f"{name}: started, output in {config.output}")
    started = time.monotonic()
    load_function(STAGE_FUNCTIONS[stage])(config, runtime)
    runtime.barrier()
    on_main(runtime, lambda: writing(config.output, partial(complete_stage, config.output, stage, digest)))
    say(runtime, f"{name}: done in {show_duration(time.monotonic() - started)}")


def check_agreement(digest: str, runtime: Runtime) -> None:
    """Raise ConfigError on all ranks if they were started with different settings or versions. Collective."""
    seen = runtime.gather_objects((digest, __version__))
    on_main(runtime, lambda: _compare(seen or []))


def on_main(runtime: Runtime, work: Callable[[], T]) -> T:
    """Do something on rank 0 and give its result, or raise its ExoError, on every rank. Collective over the world.

    The result is pickled.
    """
    result: T | None = None
    failure: ExoError | None = None
    if runtime.is_main:
        try:
            result = work()
        except ExoError as error:
            failure = error
    result, failure = runtime.broadcast_object((result, failure))
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def writing(output: Path, work: Callable[[], T]) -> T:
    """Do something with a stage's output directory; a failure of the file system is a ConfigError for `output`."""
    try:
        return work()
    except OSError as error:
        raise ConfigError(
            f"output {output}",
            f"cannot be written ({error.strerror}: {error.filename})",
            expected="a directory that can be made and written, with space left",
            fix="choose another output, or make room",
        ) from None


def load_function(target: str) -> Callable[[StageConfig, Runtime], None]:
    """The function that `package.module:name` stands for."""
    module, _, name = target.partition(":")
    function: Callable[[StageConfig, Runtime], None] = getattr(importlib.import_module(module), name)
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
