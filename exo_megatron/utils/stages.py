"""The two marks that a stage leaves in its output directory: its configuration, and that it is complete."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exo_megatron.errors import DataError
from exo_megatron.utils.files import read_json, write_json, write_text

CONFIG_FILE = "config.yaml"
STARTED_FILE = "stage-started.json"
COMPLETE_FILE = "stage.json"


@dataclass(frozen=True)
class StageMarks:
    """Which configuration an output directory was begun and completed with, as digests."""

    started: str | None
    completed: str | None


def begin_stage(output: Path, stage: str, *, config_text: str, digest: str) -> None:
    """Write `config.yaml` and take away the mark of completion. Called by one process.

    config_text: the resolved configuration, as YAML.
    digest: of the configuration and, in a `run`, of the stages that it depends on.
    """
    output.mkdir(parents=True, exist_ok=True)
    withdraw_completion(output)
    write_text(output / CONFIG_FILE, config_text)
    write_json(output / STARTED_FILE, {"stage": stage, "config_digest": digest})


def complete_stage(output: Path, stage: str, digest: str) -> None:
    """Write `stage.json`, last of all files of the stage. Called by one process, after all have ended their work."""
    write_json(output / COMPLETE_FILE, {"stage": stage, "status": "complete", "config_digest": digest})


def withdraw_completion(output: Path) -> None:
    """Make a stage count as incomplete."""
    (output / COMPLETE_FILE).unlink(missing_ok=True)


def mark_stale(output: Path) -> None:
    """Say of a directory that was begun that what it holds belongs to inputs that are no longer there."""
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


def completed_digest(output: Path) -> str | None:
    """Digest of the configuration that the stage in this directory was completed with; None where it was not."""
    return _digest(output / COMPLETE_FILE)


def read_marks(output: Path) -> StageMarks:
    """What is known about a directory; a missing or damaged mark counts as none."""
    return StageMarks(started=_digest(output / STARTED_FILE), completed=completed_digest(output))


def _digest(path: Path) -> str | None:
    try:
        record = read_json(path)
    except DataError:
        return None
    if not isinstance(record, dict) or record.get("status", "complete") != "complete":
        return None
    digest = record.get("config_digest")
    return digest if isinstance(digest, str) else None
