"""Finding checkpoints on disk and reading the small files in them. Imports neither torch nor megatron."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import ValidationError

from exo_megatron.checkpoint.manifest import (
    MANIFEST_FILE,
    STAGING_MARKER,
    WEIGHTS_DIRECTORY,
    in_the_making,
    read_manifest,
)
from exo_megatron.errors import CheckpointError, DataError
from exo_megatron.models.spec import ModelSpec
from exo_megatron.utils.files import read_json

SPEC_FILE = "model.json"
HF_DIRECTORY = "hf"
TRAINER_FILE = "trainer.json"
STEPS_DIRECTORY = "checkpoints"
LATEST_FILE = "latest"

_STEP_NAME = re.compile(r"step-(\d+)")


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies below a training output's `checkpoints/`."""
    return root / f"step-{step:08d}"


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means by a path.

    That is `path` itself if it is a complete checkpoint, else the newest complete step in `path` or in
    `path/checkpoints`, found by scanning. Raises CheckpointError if there is none, and for an output in the making.
    """
    if in_the_making(path):
        raise CheckpointError(
            str(path),
            f"is an output in the making, or left by a run that was stopped ({STAGING_MARKER})",
            expected="a complete checkpoint",
            fix="wait for the run that makes it, or run it again",
        )
    if (path / MANIFEST_FILE).is_file():
        read_manifest(path)
        return path
    steps = list_steps(path)
    if steps:
        return steps[-1][1]
    if not path.exists():
        raise CheckpointError(
            str(path), "does not exist", expected="a checkpoint or a stage's output directory", fix="check the path"
        )
    raise CheckpointError(
        str(path),
        _why_no_checkpoint(path),
        expected=f"a directory with {MANIFEST_FILE}, or complete steps in {STEPS_DIRECTORY}/",
        fix="convert an HF checkpoint with tools/convert_hf_to_megatron.py, or run the stage that makes it to its end",
    )


def list_steps(path: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a training output (or of its `checkpoints/`), as (step, directory), ascending.

    A directory counts if its manifest can be read and is of that step; checksums are for `verify_checkpoint`.
    """
    found: list[tuple[int, Path]] = []
    for root in (path, path / STEPS_DIRECTORY):
        if root.is_dir():
            found += [(step, child) for child in root.iterdir() if (step := _complete_step(child)) is not None]
    return sorted(found)


def read_spec(checkpoint: Path) -> ModelSpec:
    """Architecture of the model in a checkpoint."""
    path = checkpoint / SPEC_FILE
    try:
        return ModelSpec.model_validate(read_json(path))
    except (DataError, ValidationError) as error:
        raise CheckpointError(
            str(path),
            f"is not the description of a model ({' '.join(str(error).split())[:200]})",
            expected="a model.json of this version of exo-megatron",
            fix="convert the HF checkpoint again",
        ) from None


def read_fingerprint(checkpoint: Path) -> str:
    """SHA-256 (hex) that identifies the weights; later stages record it."""
    return read_manifest(checkpoint).fingerprint


def read_step(checkpoint: Path) -> int | None:
    """Optimizer steps done when the checkpoint was saved; None for a converted model."""
    return read_manifest(checkpoint).step


def tokenizer_path(checkpoint: Path) -> Path:
    """The directory with the tokenizer and configuration files of the HF checkpoint."""
    return checkpoint / HF_DIRECTORY


def weights_path(checkpoint: Path) -> Path:
    """The directory in megatron-core's `torch_dist` format."""
    return checkpoint / WEIGHTS_DIRECTORY


def _complete_step(child: Path) -> int | None:
    match = _STEP_NAME.fullmatch(child.name)
    if match is None or not child.is_dir() or in_the_making(child):
        return None
    try:
        step = read_manifest(child).step
    except CheckpointError:
        return None
    return step if step == int(match.group(1)) else None


def _why_no_checkpoint(path: Path) -> str:
    if not path.is_dir():
        return "is a file"
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return "is an HF checkpoint"
    if (path / STEPS_DIRECTORY).is_dir():
        return f"has no complete checkpoint in {STEPS_DIRECTORY}/"
    return "holds no complete checkpoint"
