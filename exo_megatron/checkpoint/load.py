"""Reading a checkpoint: verified against its manifest, and with nothing in it run."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from exo_megatron.checkpoint.collective import together
from exo_megatron.checkpoint.directory import TRAINER_FILE, list_steps, weights_path
from exo_megatron.checkpoint.dist_format import read_sharded, template_shapes
from exo_megatron.checkpoint.manifest import (
    Manifest,
    check_file,
    check_size,
    holds_tensors,
    list_files,
    read_manifest,
)
from exo_megatron.checkpoint.unpickling import check_pickles, read_metadata, refuse_unsafe_environment, tensor_entries
from exo_megatron.errors import CheckpointError, DataError
from exo_megatron.utils.files import read_json


def verify_checkpoint(path: Path) -> None:
    """Compare every file of a checkpoint with its manifest, in this process.

    Raises CheckpointError that names the first file that is missing, truncated, changed, or not in the manifest, and
    an older complete checkpoint where there is one.
    """
    manifest = read_manifest(path)
    _check_names(path, manifest)
    _check_files(path, manifest, sorted(manifest.files))


def verify_together(path: Path) -> None:
    """`verify_checkpoint` with the files divided among all ranks. Collective over the world; all ranks raise."""
    manifest = together(lambda: _read_and_check_names(path))
    together(lambda: _check_files(path, manifest, _my_files(manifest)))


def verify_small_files(path: Path) -> None:
    """Compare the size of every file of a checkpoint with its manifest, and the content of all but the tensor files.

    Collective over the world; all ranks raise. The tensor files are for `tensors_verified`.
    """
    manifest = together(lambda: _read_and_check_names(path))
    together(lambda: _check_small_files(path, manifest))


@contextmanager
def tensors_verified(path: Path) -> Iterator[None]:
    """Compare the tensor files of a checkpoint with its manifest while the block uses them. Collective over the world.

    At the end of the block all ranks raise CheckpointError if a file is damaged: nothing that was made of it may be
    used before that. An exception of the block ends the comparison.
    """
    manifest = together(lambda: read_manifest(path))
    stop = Event()
    names = [name for name in _my_files(manifest) if holds_tensors(name)]
    with ThreadPoolExecutor(1, thread_name_prefix="verify") as thread:
        verified = thread.submit(_check_files, path, manifest, names, stop)
        try:
            yield
        except BaseException:
            stop.set()
            raise
        together(verified.result)


def load_sharded(checkpoint: Path, sharded_state: dict[str, Any]) -> dict[str, Any]:
    """Fill a template of megatron-core sharded tensors and objects from a checkpoint. Collective over the world.

    sharded_state: what `sharded_state_dict()` of a model (and of its optimizer) returned at the present topology,
        which may differ from the one that saved. Its tensors are filled in place, cast to their dtype.
    Returns the filled state dict: under the template's top-level keys, also the values that were not sharded when
        saved (the optimizer's parameter groups); without `_extra_state`.

    Raises CheckpointError before anything is loaded if a tensor is missing or has another global shape, or if a
    pickled part calls for anything but tensors and plain values. Checksums are not looked at: `verify_together`.
    """
    weights = weights_path(checkpoint)
    together(lambda: _check(weights, template_shapes(sharded_state)))
    try:
        loaded = read_sharded(sharded_state, weights)
    except (CheckpointingException, KeyError, OSError, RuntimeError) as error:
        raise _misfit(weights, error) from error
    except CheckpointException as error:  # torch's: a BaseException with the failures of all ranks
        raise _misfit(weights, next(iter(error.failures.values()))[0]) from error
    return {key: value for key, value in loaded.items() if key in sharded_state}


def load_module(module: nn.Module, state: dict[str, Any], where: str) -> None:
    """`module.load_state_dict`, strict but for `_extra_state`, which checkpoints do not hold."""
    missing, unexpected = module.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.endswith("_extra_state")]
    if missing or unexpected:
        raise CheckpointError(
            where,
            f"has no {', '.join(missing[:3])}" if missing else f"has the unknown {', '.join(unexpected[:3])}",
            expected="the tensors of the model and no others",
            fix="use a checkpoint of this model",
        )


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The training loop's own state, as given to `save_checkpoint`."""
    path = checkpoint / TRAINER_FILE
    try:
        state: dict[str, Any] = read_json(path)
    except DataError as error:
        raise CheckpointError(
            str(path),
            error.problem,
            expected="a training checkpoint",
            fix="resume from a checkpoint of a training stage",
        ) from None
    return state


def _misfit(weights: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        str(weights),
        f"cannot be loaded ({' '.join(str(error).split())[:200]})",
        expected="a checkpoint with all that the model and its optimizer ask for",
        fix="load it with the version and settings that saved it, or start from another checkpoint",
    )


def _read_and_check_names(path: Path) -> Manifest:
    manifest = read_manifest(path)
    _check_names(path, manifest)
    return manifest


def _my_files(manifest: Manifest) -> list[str]:
    """This rank's part of the files, about as many bytes for each rank."""
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].bytes, name))
    return by_size[dist.get_rank() :: dist.get_world_size()]


def _check_names(path: Path, manifest: Manifest) -> None:
    extra = [name for name in list_files(path) if name not in manifest.files and name.startswith("weights/")]
    if extra:
        raise CheckpointError(
            str(path / extra[0]),
            "does not belong to the checkpoint",
            expected="only the files of the manifest in weights/",
            fix="remove the file",
        )


def _check_small_files(path: Path, manifest: Manifest) -> None:
    with _offering_an_older(path):
        for name, record in manifest.files.items():
            if holds_tensors(name):
                check_size(path, name, record)
            else:
                check_file(path, name, record)


def _check_files(path: Path, manifest: Manifest, names: list[str], stop: Event | None = None) -> None:
    with _offering_an_older(path):
        for name in names:
            check_file(path, name, manifest.files[name], stop)


@contextmanager
def _offering_an_older(path: Path) -> Iterator[None]:
    """Name an older complete checkpoint, where there is one, in the error about a damaged one."""
    try:
        yield
    except CheckpointError as error:
        older = [directory for _, directory in list_steps(path.parent) if directory.name < path.name]
        if not older:
            raise
        fix = f"{error.fix}; the next older one is {older[-1]}"
        raise CheckpointError(error.where, error.problem, expected=error.expected, fix=fix) from None


def _check(weights: Path, wanted: dict[str, tuple[int, ...]]) -> None:
    refuse_unsafe_environment()
    metadata = read_metadata(weights)
    check_pickles(weights, metadata)
    _check_shapes(weights, metadata, wanted)


def _check_shapes(weights: Path, metadata: Metadata, wanted: dict[str, tuple[int, ...]]) -> None:
    stored = tensor_entries(metadata)
    for key, shape in wanted.items():
        if key not in stored:
            raise CheckpointError(
                str(weights),
                f"has no tensor {key}",
                expected=f"{key} of shape {list(shape)}",
                fix="use a checkpoint of this model",
            )
        if tuple(stored[key].size) != shape:
            raise CheckpointError(
                str(weights),
                f"{key} has shape {list(stored[key].size)}",
                expected=f"shape {list(shape)}",
                fix="use a checkpoint of this model (same vocabulary, sizes and number of layers)",
            )
