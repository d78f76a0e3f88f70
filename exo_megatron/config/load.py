"""Configuration of one stage, or of a workflow, from a file and settings of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exo_megatron.config.describe import nearest
from exo_megatron.config.document import (
    COMMAND_LINE,
    Document,
    Origin,
    apply_override,
    parse_override,
    read_document,
)
from exo_megatron.config.sections import Section
from exo_megatron.config.stages import COMMAND_CONFIGS, STAGE_CONFIGS, StageConfig
from exo_megatron.config.validate import validate, validate_stage
from exo_megatron.config.workflow import Workflow, plan_workflow
from exo_megatron.errors import ConfigError


def load_stage_config(stage: str, file: Path | None, overrides: Sequence[str]) -> StageConfig:
    """Read the configuration of a stage.

    `stage` is a key of STAGE_CONFIGS, and the result is of the class named there. `file` is YAML,
    or None where `overrides` (`a.b.c=value`, applied in order) give everything. Raises ConfigError
    for any flaw.
    """
    if stage not in STAGE_CONFIGS:
        near = nearest(stage, STAGE_CONFIGS)
        raise ConfigError(
            COMMAND_LINE,
            f"unknown stage {stage!r}",
            expected="one of " + ", ".join(STAGE_CONFIGS),
            fix=f"write {near}" if near else "choose one of them",
        )
    return validate_stage(STAGE_CONFIGS[stage], _read(file, overrides))


def load_command_config(command: str, file: Path | None, overrides: Sequence[str]) -> Section:
    """Read the settings of a command that is no stage, a key of COMMAND_CONFIGS.

    Raises ConfigError for any flaw.
    """
    return validate(COMMAND_CONFIGS[command], _read(file, overrides))


def load_run_config(file: Path | None, overrides: Sequence[str]) -> Workflow:
    """Read a workflow and check the configuration of every stage. Raises ConfigError for any flaw.

    Overrides are `output=...`, `seed=...`, `defaults.SECTION.KEY=...`, and `stages.NAME.KEY=...`
    for a key of the configuration of the stage called NAME.
    """
    return plan_workflow(_open(file), [parse_override(text) for text in overrides])


def _read(file: Path | None, overrides: Sequence[str]) -> Document:
    document = _open(file)
    for text in overrides:
        apply_override(document, parse_override(text))
    return document


def _open(file: Path | None) -> Document:
    return Document({}, {(): Origin(COMMAND_LINE, "")}) if file is None else read_document(file)
