"""Checks before a checkpoint is used: files as in the manifest, and pickles without code.

torch unpickles `.metadata` and sharded objects without restriction. Here they are read first with
an unpickler that knows only the classes that such files need, so that a crafted file is refused
before torch or megatron-core opens it. Imports torch, but not megatron-core.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePath
from threading import Event
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from exo_megatron.checkpoint.directory import (
    Manifest,
    check_file,
    check_size,
    holds_tensors,
    list_files,
    list_steps,
    read_manifest,
)
from exo_megatron.errors import CheckpointError
from exo_megatron.parallel.ending import failing_together


def verify_checkpoint(path: Path) -> None:
    """Compare every file of a checkpoint with its manifest, in this process.

    Raises CheckpointError that names the first file that is missing, truncated, changed, or not in
    the manifest, and an older complete checkpoint if there is one.
    """
    manifest = read_manifest(path)
    _check_names(path, manifest)
    _check_files(path, manifest, sorted(manifest.files))


def verify_together(path: Path) -> None:
    """Compare every file of a checkpoint with its manifest, the files divided among all ranks.

    Collective over the world; all ranks raise. See `verify_checkpoint`.
    """
    with failing_together():
        manifest = _read_and_check_names(path)
    with failing_together():
        _check_files(path, manifest, _my_files(manifest))


def verify_small_files(path: Path) -> None:
    """Compare file sizes with a checkpoint's manifest, and all content but the tensor files'.

    Collective over the world; all ranks raise. `tensors_verified` compares the tensor files.
    """
    with failing_together():
        manifest = _read_and_check_names(path)
    with failing_together():
        _check_small_files(path, manifest)


@contextmanager
def tensors_verified(path: Path) -> Iterator[None]:
    """Compare the tensor files of a checkpoint with its manifest while the block uses them.

    Collective over the world. At the end of the block all ranks raise CheckpointError if a file is
    damaged: nothing that was made of it may be used before that. An exception of the block ends the
    comparison.
    """
    with failing_together():
        manifest = read_manifest(path)
    stop = Event()
    names = [name for name in _my_files(manifest) if holds_tensors(name)]
    with ThreadPoolExecutor(1, thread_name_prefix="verify") as thread:
        verified = thread.submit(_check_files, path, manifest, names, stop)
        try:
            yield
        except BaseException:
            stop.set()
            raise
        with failing_together():
            verified.result()


def _read_and_check_names(path: Path) -> Manifest:
    manifest = read_manifest(path)
    _check_names(path, manifest)
    return manifest


def _my_files(manifest: Manifest) -> list[str]:
    """List this rank's part of the files, about as many bytes for each rank."""
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
    """Name an older complete checkpoint, if there is one, in the error about a damaged one."""
    try:
        yield
    except CheckpointError as error:
        older = [directory for _, directory in list_steps(path.parent) if directory.name < path.name]
        if not older:
            raise
        fix = f"{error.fix}; the next older one is {older[-1]}"
        raise CheckpointError(error.where, error.problem, expected=error.expected, fix=fix) from None


METADATA_FILE = ".metadata"
COMMON_FILE = "common.pt"

_DCP = "torch.distributed.checkpoint"
_ALLOWED: dict[str, frozenset[str]] = {
    f"{_DCP}.metadata": frozenset(
        {
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    f"{_DCP}.planner": frozenset({"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"}),
    f"{_DCP}.filesystem": frozenset({"_StorageInfo", "_StoragePrefix"}),
    "torch": frozenset({"Size"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "collections": frozenset({"OrderedDict"}),
    "builtins": frozenset({"set"}),
    "pathlib": frozenset({"PosixPath"}),
    "pathlib._local": frozenset({"PosixPath"}),
}
_SWITCHED_OFF = frozenset({"", "0", "n", "no", "false"})
FORCE_UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class _Refused(pickle.UnpicklingError):
    """Error for a pickle that names something that a checkpoint does not need."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = name in _ALLOWED.get(module, ()) or (module == "torch" and _is_dtype(name))
        if not allowed:
            raise _Refused(f"it calls for {module}.{name}")
        return super().find_class(module, name)


def _is_dtype(name: str) -> bool:
    return isinstance(vars(torch).get(name), torch.dtype)


def refuse_unsafe_environment() -> None:
    """Raise CheckpointError where torch has been told to unpickle everything it loads."""
    value = os.environ.get(FORCE_UNSAFE, "")
    if value.lower() not in _SWITCHED_OFF:
        raise CheckpointError(
            FORCE_UNSAFE,
            f"is {value!r} in the environment, which lets checkpoints run code",
            expected="the variable unset",
            fix=f"unset {FORCE_UNSAFE}",
        )


def read_metadata(weights: Path) -> Metadata:
    """Read the index of a `torch_dist` directory: tensors, their chunks, and where the chunks lie.

    Raises CheckpointError if the file is missing or damaged, if it calls for anything but the
    classes of an index (nothing of it has run then), or if it points to a file outside of the
    directory.
    """
    path = weights / METADATA_FILE
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except _Refused as error:
        raise _refuse(path, str(error)) from None
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise _unreadable(path, f"{type(error).__name__}: {error}") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise _unreadable(path, f"it holds a {type(metadata).__name__}")
    for info in metadata.storage_data.values():
        if PurePath(info.relative_path).name != info.relative_path:
            raise _refuse(path, f"it names the file {info.relative_path!r}, which is outside of the directory")
        if "transform_descriptors" in vars(info) and info.transform_descriptors:
            raise _refuse(path, f"it asks for the stream transforms {list(info.transform_descriptors)}")
    return metadata


def check_pickles(weights: Path, metadata: Metadata) -> None:
    """Check `common.pt` and sharded objects with torch's weights-only unpickler.

    Raises CheckpointError that names the file and the object. Nothing in a refused pickle has run.
    """
    refuse_unsafe_environment()
    common = weights / COMMON_FILE
    if common.is_file():
        _check_weights_only(common, common.read_bytes(), "common state")
    for index, info in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            path = weights / info.relative_path
            with open(path, "rb") as file:
                file.seek(info.offset)
                _check_weights_only(path, file.read(info.length), index.fqn)


def tensor_entries(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """Return the tensors of an index by key, without the sharded objects."""
    return {
        key: entry for key, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
    }


def _check_weights_only(path: Path, data: bytes, what: str) -> None:
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refuse(path, f"{what}: {' '.join(str(error).split())[:160]}") from None
    except Exception as error:  # a damaged archive raises almost anything
        raise _unreadable(path, f"{what}: {type(error).__name__}: {error}") from None


def _refuse(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        str(path),
        f"is refused, nothing of it was run: {why}",
        expected="a checkpoint of tensors and plain values",
        fix="do not use this checkpoint; get it again from a source that you trust",
    )


def _unreadable(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        str(path),
        f"cannot be read ({why})",
        expected="a distributed checkpoint of megatron-core (torch_dist)",
        fix="copy the file again from where it is whole, or use another checkpoint",
    )
