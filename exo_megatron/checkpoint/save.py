"""Functions that save a checkpoint so that it is either whole or absent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from exo_megatron.checkpoint.directory import (
    HF_DIRECTORY,
    LATEST_FILE,
    MANIFEST_FILE,
    SPEC_FILE,
    TRAINER_FILE,
    WEIGHTS_DIRECTORY,
    CheckpointKind,
    FileRecord,
    in_the_making,
    list_files,
    list_steps,
    make_manifest,
    record_files,
    weights_path,
    write_manifest,
)
from exo_megatron.checkpoint.dist_format import Producer, ProducerError, Writing, local_bytes, plan_writing
from exo_megatron.checkpoint.hf_files import check_hf_files, copy_hf_files
from exo_megatron.checkpoint.publish import (
    claim,
    clear_staging,
    make_staging,
    publish,
    remove_checkpoint,
    remove_tree,
    staging_path,
)
from exo_megatron.errors import CheckpointError
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.ending import failing_together, on_main
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.utils.disk import check_space, reporting, write_failure
from exo_megatron.utils.files import write_json, write_text

_SMALL_FILES = 64 * 2**20
"""Bytes allowed for everything but tensors: tokenizer, index, manifest."""


def save_checkpoint(
    target: Path,
    sharded_state: dict[str, Any],
    *,
    spec: ModelSpec,
    hf_files: Path,
    step: int | None,
    kind: CheckpointKind,
    trainer_state: dict[str, Any] | None,
    runtime: Runtime,
    produce: Producer | None = None,
    inspect: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint to the directory `target`.

    Collective over the world; all ranks see one file system. Everything is made in `tmp-<name>`
    beside the target, flushed, and renamed; checksums of tensors are computed while they are
    written. A step that exists already is replaced.

    Args:
        target: directory of the checkpoint.
        sharded_state: megatron-core's sharded state dict of this rank (model, optimizer); other
            values in it must be the same on all ranks. Shards on the meta device are filled by
            `produce` when they are written.
        spec: architecture of the model.
        hf_files: directory from which configuration and tokenizer files are copied.
        step: optimizer steps done; if given, `latest` beside the target is set to it.
        kind: "model" or "training".
        trainer_state: JSON, as on rank 0.
        runtime: the world.
        produce: makes the data of shards on the meta device.
        inspect: called on all ranks with the finished checkpoint before it is moved to `target`; to
            refuse it, it raises a CheckpointError.

    Raises:
        StorageError, CheckpointError: on every rank if any rank failed; the target is then as it was before.
    """
    small = SmallFiles(spec, hf_files, trainer_state)
    save = begin_save(target, sharded_state, small, step=step, kind=kind, runtime=runtime, produce=produce)
    save.write()
    save.end(inspect)


@dataclass(frozen=True)
class SmallFiles:
    """The content of a checkpoint beside its tensors; see `save_checkpoint`."""

    spec: ModelSpec
    hf_files: Path
    trainer_state: dict[str, Any] | None


def begin_save(
    target: Path,
    sharded_state: dict[str, Any],
    small: SmallFiles,
    *,
    step: int | None,
    kind: CheckpointKind,
    runtime: Runtime,
    produce: Producer | None = None,
    snapshot: bool = False,
) -> Save:
    """Do the first part of `save_checkpoint`: space, the staging directory, who writes what.

    Collective over the world. snapshot: copy this rank's tensors, so that they may change before
    `write`.
    """
    staging = staging_path(target)
    with failing_together():
        needed = sum(_gather_sizes(runtime, sharded_state)) + _SMALL_FILES
    on_main(runtime, lambda: _prepare(target, small.hf_files, kind, needed))
    try:
        writing = _plan(sharded_state, staging, produce, snapshot=snapshot, needed=needed)
    except Exception:
        if runtime.is_main:
            remove_tree(staging)
        raise
    return Save(target, staging, writing, small, step, kind, runtime, needed)


class Save:
    """A checkpoint that has been begun: `write` on every rank, then `end` on all."""

    def __init__(
        self,
        target: Path,
        staging: Path,
        writing: Writing,
        small: SmallFiles,
        step: int | None,
        kind: CheckpointKind,
        runtime: Runtime,
        needed: int,
    ) -> None:
        self._target = target
        self._staging = staging
        self._writing = writing
        self._small = small
        self._step = step
        self._kind = kind
        self._runtime = runtime
        self._needed = needed
        self._failure: Exception | None = None

    def write(self) -> None:
        """Write this rank's tensors, in any thread. A failure is kept for `end`."""
        try:
            self._writing.write()
        except ProducerError as error:
            where, problem, expected, fix = error.args
            self._failure = CheckpointError(where, problem, expected=expected, fix=fix)
        except OSError as error:
            self._failure = write_failure(self._staging, error, needed=self._needed)
        except Exception as error:
            self._failure = error

    def end(self, inspect: Callable[[Path], None] | None = None) -> None:
        """Do the last part of `save_checkpoint`. Collective over the world, after `write` on every rank."""
        try:
            with failing_together():
                if self._failure is not None:
                    raise self._failure
            written = self._writing.end(self._runtime)
            on_main(self._runtime, lambda: _write_small_files(self._staging, self._small))
            shards = _gather_records(written, self._runtime)
            on_main(self._runtime, lambda: _complete(self._staging, shards, self._step, self._kind))
            if inspect is not None:
                inspect(self._staging)
            on_main(self._runtime, lambda: _put_in_place(self._staging, self._target, self._step, self._kind))
        except Exception:
            if self._runtime.is_main:
                remove_tree(self._staging)
            raise


def check_room(root: Path, local: int, runtime: Runtime) -> None:
    """Raise StorageError on every rank if the file system of `root` has no room for one checkpoint.

    Collective over the world. local: bytes that this rank will write of it.
    """
    sizes = runtime.gather_objects(local) or []
    on_main(runtime, lambda: check_space(root, sum(sizes) + _SMALL_FILES))


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints in `root`, and staging left by a crash.

    One rank calls it. A directory that has a staging name but is not ours stays.
    """
    for _, directory in list_steps(root)[:-keep]:
        remove_checkpoint(directory)
    for leftover in root.glob("tmp-step-*"):
        if in_the_making(leftover) or (leftover.is_dir() and not any(leftover.iterdir())):
            remove_tree(leftover)


def _gather_sizes(runtime: Runtime, sharded_state: dict[str, Any]) -> list[int]:
    sizes = runtime.gather_objects(local_bytes(sharded_state))
    return runtime.broadcast_object(sizes if sizes is not None else [])


def _prepare(target: Path, hf_files: Path, kind: CheckpointKind, needed: int) -> None:
    check_hf_files(hf_files)
    with reporting(target, needed=needed):
        if kind == "training":
            target.parent.mkdir(exist_ok=True)  # but not the stage's output, which is there unless somebody took it
            clear_staging(target)
        else:
            claim(target, MANIFEST_FILE, target)
        check_space(target, needed)
        weights_path(make_staging(target)).mkdir()


def _plan(
    sharded_state: dict[str, Any], staging: Path, produce: Producer | None, *, snapshot: bool, needed: int
) -> Writing:
    """Plan the tensors of all ranks. Collective over the world.

    torch gathers the failures of all ranks and raises them on each.
    """
    try:
        return plan_writing(sharded_state, weights_path(staging), produce, snapshot=snapshot)
    except CheckpointException as error:
        causes = [failure[0] for failure in error.failures.values()]
        for cause in causes:
            if isinstance(cause, OSError):
                raise write_failure(staging, cause, needed=needed) from error
        # torch's exception is a BaseException, which no handler of ordinary failures would see.
        raise RuntimeError(f"saving {staging} failed") from error


def _write_small_files(staging: Path, small: SmallFiles) -> None:
    with reporting(staging):
        write_json(staging / SPEC_FILE, small.spec.model_dump(mode="json"))
        copy_hf_files(small.hf_files, staging / HF_DIRECTORY)
        if small.trainer_state is not None:
            write_json(staging / TRAINER_FILE, small.trainer_state)


def _gather_records(written: dict[str, FileRecord], runtime: Runtime) -> dict[str, FileRecord]:
    """Gather the records of all ranks' tensor files on rank 0; an empty dict elsewhere."""
    parts = runtime.gather_objects(written) or []
    return {f"{WEIGHTS_DIRECTORY}/{name}": record for part in parts for name, record in part.items()}


def _complete(staging: Path, shards: dict[str, FileRecord], step: int | None, kind: CheckpointKind) -> None:
    """Write the manifest.

    Args:
        staging: the directory in which the checkpoint is made.
        shards: the files whose content is known from writing them; all others are small, and read.
        step: optimizer steps done, or None.
        kind: "model" or "training".
    """
    with reporting(staging):
        others = [name for name in list_files(staging) if name not in shards]
        write_manifest(staging, make_manifest({**shards, **record_files(staging, others)}, step=step, kind=kind))


def _put_in_place(staging: Path, target: Path, step: int | None, kind: CheckpointKind) -> None:
    with reporting(target):
        if kind == "training" and target.exists():
            remove_checkpoint(target)
        publish(staging, target, MANIFEST_FILE, target)
        if step is not None:
            write_text(target.parent / LATEST_FILE, f"{target.name}\n")
