"""The manifest of a checkpoint: which files belong to it, with their checksums. Its presence means complete."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exo_megatron.errors import CheckpointError, DataError
from exo_megatron.utils.files import read_json, sha256_file, write_json

MANIFEST_FILE = "manifest.json"
WEIGHTS_DIRECTORY = "weights"
STAGING_MARKER = ".exo-staging"
"""In a directory that a run of ours is making, or was making when it was stopped: never complete."""

CheckpointKind = Literal["model", "training"]


class FileRecord(BaseModel):
    """Content of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Manifest(BaseModel):
    """What `manifest.json` holds. Paths are relative to the checkpoint, with forward slashes."""

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
    """Whether a run of ours has begun to make this directory and has not finished."""
    return (directory / STAGING_MARKER).is_file()


def list_files(checkpoint: Path) -> list[str]:
    """Relative paths of all files below a checkpoint but the manifest and the marker of staging, sorted."""
    paths = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    return sorted(name for name in paths if name not in (MANIFEST_FILE, STAGING_MARKER))


def record_files(checkpoint: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Read the named files and record their content."""
    return {
        name: FileRecord(sha256=sha256_file(checkpoint / name), bytes=(checkpoint / name).stat().st_size)
        for name in names
    }


def make_manifest(files: dict[str, FileRecord], *, step: int | None, kind: CheckpointKind) -> Manifest:
    """The manifest of these files.

    The fingerprint is the SHA-256 of the sorted lines "name sha256" of the tensor files and `model.json`. The other
    files below `weights/` are left out: they name paths and times of the save, not weights.
    """
    files = dict(sorted(files.items()))
    named = [name for name in files if name == "model.json" or holds_tensors(name)]
    text = "".join(f"{name} {files[name].sha256}\n" for name in named)
    return Manifest(fingerprint=hashlib.sha256(text.encode()).hexdigest(), files=files, step=step, kind=kind)


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Mark a checkpoint as complete."""
    write_json(checkpoint / MANIFEST_FILE, manifest.model_dump(mode="json"))


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check the manifest. A missing or malformed one is a CheckpointError: the checkpoint is incomplete."""
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
    """Raise CheckpointError unless a file has the recorded size and SHA-256. Once `stop` is set, returns unread."""
    check_size(checkpoint, name, record)
    path = checkpoint / name
    seen = sha256_file(path, stop)
    if stop is not None and stop.is_set():
        return
    if seen != record.sha256:
        raise _damaged(path, f"is corrupt (SHA-256 {seen[:12]}...)", f"SHA-256 {record.sha256[:12]}...")


def holds_tensors(name: str) -> bool:
    """Whether a file of a checkpoint is one of those that grow with the model."""
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
