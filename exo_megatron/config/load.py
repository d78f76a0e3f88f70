"""Configuration of one stage, or of a run of stages, from a file and settings of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exo_megatron.config.describe import nearest
from exo_megatron.config.document import COMMAND_LINE, Document, Origin, read_document
from exo_megatron.config.dump import config_digest, dump_config, render_config
from exo_megatron.config.overrides import apply_override, parse_override
from exo_megatron.config.pipeline import Pipeline, PlannedStage, plan_pipeline
from exo_megatron.config.stages import STAGE_CONFIGS, StageConfig
from exo_megatron.config.validate import validate_stage
from exo_megatron.errors import ConfigError

__all__ = [
    "Pipeline",
    "PlannedStage",
    "config_digest",
    "dump_config",
    "load_run_config",
    "load_stage_config",
    "render_config",
]


def load_stage_config(stage: str, file: Path | None, overrides: Sequence[str]) -> StageConfig:
    """Read the configuration of a stage.

    stage: a key of STAGE_CONFIGS; the answer is of the class named there. file: YAML, or None where `overrides`
    (`a.b.c=value`, applied in order) give everything. Raises ConfigError for any flaw.
    """
    if stage not in STAGE_CONFIGS:
        near = nearest(stage, STAGE_CONFIGS)
        raise ConfigError(
            COMMAND_LINE,
            f"unknown stage {stage!r}",
            expected="one of " + ", ".join(STAGE_CONFIGS),
            fix=f"write {near}" if near else "choose one of them",
        )
    document = _open(file)
    for text in overrides:
        apply_override(document, parse_override(text))
    return validate_stage(STAGE_CONFIGS[stage], document)


def load_run_config(file: Path | None, overrides: Sequence[str]) -> Pipeline:
    """Read a pipeline of stages; every stage's configuration is checked. Raises ConfigError for any flaw.

    Overrides: `output=...`, `seed=...`, `defaults.SECTION.KEY=...`, and `stages.NAME.KEY=...` for a key of the
    configuration of the stage called NAME.
    """
    return plan_pipeline(_open(file), [parse_override(text) for text in overrides])


def _open(file: Path | None) -> Document:
    return Document({}, {(): Origin(COMMAND_LINE, "")}) if file is None else read_document(file)
