"""Checkpoints on disk: their names, their manifest, and the small files in them.

Imports neither torch nor megatron. The manifest lists the files that belong to a checkpoint with
their checksums. A checkpoint with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exo_megatron.errors import CheckpointError, DataError
from exo_megatron.models.spec import ModelSpec
from exo_megatron.utils.files import read_json, sha256_file, write_json

MANIFEST_FILE = "manifest.json"
WEIGHTS_DIRECTORY = "weights"
RECORDS_SUFFIX = ".records.json"
"""What the name of a tensor file's list of records ends with: [offset, bytes, SHA-256] of each tensor in it."""
STAGING_MARKER = ".exo-staging"
"""File in a directory that a run of ours makes, or was making when it was stopped."""

CheckpointKind = Literal["model", "training"]


class FileRecord(BaseModel):
    """Checksum and size of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Manifest(BaseModel):
    """Content of `manifest.json`. Paths are relative to the checkpoint, with forward slashes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str
    files: dict[str, FileRecord]
    step: int | None
    kind: CheckpointKind

    @property
    def entries(self) -> set[str]:
        """Names of the files and directories at the top of the checkpoint."""
        return {PurePosixPath(name).parts[0] for name in self.files} | {MANIFEST_FILE}


def in_the_making(directory: Path) -> bool:
    """Tell whether a run of ours has begun to make this directory and has not finished."""
    return (directory / STAGING_MARKER).is_file()


def list_files(checkpoint: Path) -> list[str]:
    """List all files below a checkpoint, sorted, without the manifest and the staging marker."""
    paths = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    return sorted(name for name in paths if name not in (MANIFEST_FILE, STAGING_MARKER))


def record_files(checkpoint: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Read the named files and return their checksums and sizes."""
    return {
        name: FileRecord(sha256=sha256_file(checkpoint / name), bytes=(checkpoint / name).stat().st_size)
        for name in names
    }


def make_manifest(files: dict[str, FileRecord], *, step: int | None, kind: CheckpointKind) -> Manifest:
    """Make the manifest of these files.

    The fingerprint is the SHA-256 of the sorted lines "name sha256" of the tensor files and
    `model.json`. The other files below `weights/` are left out: they contain paths and times of the
    save, not weights.
    """
    files = dict(sorted(files.items()))
    named = [name for name in files if name == "model.json" or holds_tensors(name)]
    text = "".join(f"{name} {files[name].sha256}\n" for name in named)
    return Manifest(fingerprint=hashlib.sha256(text.encode()).hexdigest(), files=files, step=step, kind=kind)


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Write the manifest, which marks a checkpoint as complete."""
    write_json(checkpoint / MANIFEST_FILE, manifest.model_dump(mode="json"))


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check the manifest.

    Raises CheckpointError if it is missing (the checkpoint is incomplete) or malformed.
    """
    path = checkpoint / MANIFEST_FILE
    if not path.is_file():
        raise CheckpointError(
            str(checkpoint),
            f"has no {MANIFEST_FILE}",
            expected="a complete checkpoint",
            fix="give the directory of a complete checkpoint, or save it again",
        )
    try:
        manifest = Manifest.model_validate(read_json(path))
    except (DataError, ValidationError) as error:
        raise CheckpointError(
            str(path),
            f"is damaged ({_first_line(error)})",
            expected="the manifest that was saved with the checkpoint",
            fix="use another checkpoint",
        ) from None
    for name in manifest.files:
        _check_inside(path, name)
    if make_manifest(manifest.files, step=manifest.step, kind=manifest.kind).fingerprint != manifest.fingerprint:
        raise CheckpointError(
            str(path),
            "is damaged (its fingerprint is not that of its checksums)",
            expected="the manifest that was saved with the checkpoint",
            fix="use another checkpoint",
        )
    return manifest


def check_size(checkpoint: Path, name: str, record: FileRecord) -> None:
    """Raise CheckpointError unless a file is there and has the recorded size."""
    path = checkpoint / name
    if not path.is_file():
        raise _damaged(path, "is missing", f"{record.bytes} bytes")
    size = path.stat().st_size
    if size != record.bytes:
        raise _damaged(path, f"has {size} bytes", f"{record.bytes} bytes")


def check_file(checkpoint: Path, name: str, record: FileRecord, stop: Event | None = None) -> None:
    """Raise CheckpointError unless a file has the recorded size and SHA-256.

    Once `stop` is set, returns without having read the whole file.
    """
    check_size(checkpoint, name, record)
    path = checkpoint / name
    seen = sha256_file(path, stop)
    if stop is not None and stop.is_set():
        return
    if seen != record.sha256:
        raise _damaged(path, f"is corrupt (SHA-256 {seen[:12]}...)", f"SHA-256 {record.sha256[:12]}...")


def holds_tensors(name: str) -> bool:
    """Tell whether a file of a checkpoint is one of the tensor files, which grow with the model."""
    return name.startswith(f"{WEIGHTS_DIRECTORY}/") and name.endswith(".distcp")


def _check_inside(manifest: Path, name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise CheckpointError(
            str(manifest),
            f"names the file {name!r}, which is outside of the checkpoint",
            expected="relative paths below the checkpoint",
            fix="do not use this checkpoint",
        )


def _damaged(path: Path, problem: str, expected: str) -> CheckpointError:
    return CheckpointError(
        str(path),
        problem,
        expected=expected,
        fix="copy the file again from where it is whole, or use another checkpoint",
    )


def _first_line(error: Exception) -> str:
    if isinstance(error, DataError):
        return error.problem
    return " ".join(str(error).split())[:200]


SPEC_FILE = "model.json"
HF_DIRECTORY = "hf"
TRAINER_FILE = "trainer.json"
STEPS_DIRECTORY = "checkpoints"
LATEST_FILE = "latest"

_STEP_NAME = re.compile(r"step-(\d+)")


def step_directory(root: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step below a training output's `checkpoints/`."""
    return root / f"step-{step:08d}"


def resolve_checkpoint(path: Path) -> Path:
    """Find the checkpoint that a user means by a path.

    That is `path` itself if it is a complete checkpoint, else the newest complete step in `path` or
    in `path/checkpoints`, found by scanning. Raises CheckpointError if there is none, and for an
    output in the making.
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
        fix="convert an HF checkpoint with `exo-megatron import`, or run the stage that makes it to its end",
    )


def list_steps(path: Path) -> list[tuple[int, Path]]:
    """List a training output's complete checkpoints as (step, directory), ascending.

    A directory counts if its manifest can be read and is of that step; checksums are checked by
    `verify_checkpoint`.
    """
    found: list[tuple[int, Path]] = []
    for root in (path, path / STEPS_DIRECTORY):
        if root.is_dir():
            found += [(step, child) for child in root.iterdir() if (step := _complete_step(child)) is not None]
    return sorted(found)


def skipped_steps(path: Path) -> list[str]:
    """Describe the steps of a training output, newer than its newest complete one, that cannot be used.

    One line each. Steps that a run is making, or removing, are not among them.
    """
    complete = list_steps(path)
    newest = complete[-1] if complete else None
    taken = "no complete step is left" if newest is None else f"the newest complete step is {newest[1].name}"
    lines = []
    for root in (path, path / STEPS_DIRECTORY):
        for child in sorted(root.glob("step-*")) if root.is_dir() else ():
            match = _STEP_NAME.fullmatch(child.name)
            if match is None or not child.is_dir() or in_the_making(child) or _complete_step(child) is not None:
                continue
            if newest is None or int(match.group(1)) > newest[0]:
                lines.append(f"warning: {child} cannot be used, it {_flaw(child)}; {taken}")
    return lines


def _flaw(step: Path) -> str:
    try:
        return f"says that it is step {read_manifest(step).step}"
    except CheckpointError as error:
        return f"has a {MANIFEST_FILE} that {error.problem}" if Path(error.where) != step else error.problem


def read_spec(checkpoint: Path) -> ModelSpec:
    """Read the architecture of the model in a checkpoint.

    Raises CheckpointError if its model.json is malformed.
    """
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
    """Read the SHA-256 (hex) that identifies the weights; later stages record it."""
    return read_manifest(checkpoint).fingerprint


def read_step(checkpoint: Path) -> int | None:
    """Read the number of optimizer steps done at the save; None for a converted model."""
    return read_manifest(checkpoint).step


def tokenizer_path(checkpoint: Path) -> Path:
    """Return the directory with the tokenizer and configuration files of the HF checkpoint."""
    return checkpoint / HF_DIRECTORY


def weights_path(checkpoint: Path) -> Path:
    """Return the directory in megatron-core's `torch_dist` format."""
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
