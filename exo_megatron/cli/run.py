"""The pipeline: stages in order, in one distributed job, without those that are complete."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from exo_megatron.cli.failure import leaving_together
from exo_megatron.cli.stages import check_agreement, execute_stage, on_main, say, writing
from exo_megatron.config.pipeline import Pipeline, PlannedStage
from exo_megatron.utils.files import write_text
from exo_megatron.utils.stages import mark_stale, read_marks, set_aside

if TYPE_CHECKING:
    from exo_megatron.parallel.runtime import Runtime

RUN_FILE = "run.yaml"


def run_pipeline(pipeline: Pipeline) -> None:
    """Join the world of the launcher and run the stages in it."""
    from exo_megatron.parallel.runtime import distributed_runtime

    text = pipeline.render()
    with distributed_runtime() as runtime, leaving_together(runtime):
        check_agreement(hashlib.sha256(text.encode("utf-8")).hexdigest(), runtime)
        on_main(runtime, lambda: writing(pipeline.output, lambda: write_text(pipeline.output / RUN_FILE, text)))
        for stage in pipeline.stages:
            run_planned_stage(stage, pipeline, runtime)


def run_planned_stage(stage: PlannedStage, pipeline: Pipeline, runtime: Runtime) -> None:
    """Run a stage unless it is complete with this very configuration and these upstream stages. Collective.

    A stage that was interrupted goes on in its directory. Output that another configuration left there is set aside.
    Stages downstream lose their completion before this one starts, so that they run again even if the run is
    interrupted between.
    """
    output = stage.config.output
    if on_main(runtime, lambda: read_marks(output).completed) == stage.digest:
        say(runtime, f"{stage.name}: complete already, skipped")
        return
    kept = on_main(runtime, lambda: writing(output, lambda: _make_way(stage, pipeline)))
    if kept is not None:
        say(runtime, f"{stage.name}: its configuration or inputs changed; the earlier output is kept in {kept}")
    execute_stage(stage.name, stage.stage, stage.config, stage.digest, runtime)
    _free_memory(runtime)


def _make_way(stage: PlannedStage, pipeline: Pipeline) -> Path | None:
    """Mark what depends on this stage, and move stale output away; where to, if there was any."""
    for each in pipeline.downstream(stage.name):
        mark_stale(each.config.output)
    marks = read_marks(stage.config.output)
    return set_aside(stage.config.output) if marks.started not in (None, stage.digest) else None


def _free_memory(runtime: Runtime) -> None:
    """Give back what a stage's model held; modules and their hooks refer to each other in cycles."""
    gc.collect()
    if runtime.device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
