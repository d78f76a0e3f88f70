"""Comparing the files of a checkpoint with its manifest. Imports torch, but not megatron-core."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import torch.distributed as dist

from exo_megatron.checkpoint.collective import together
from exo_megatron.checkpoint.directory import list_steps
from exo_megatron.checkpoint.manifest import (
    Manifest,
    check_file,
    check_size,
    holds_tensors,
    list_files,
    read_manifest,
)
from exo_megatron.errors import CheckpointError


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
