"""Reading the pickles of a distributed checkpoint without running code that somebody put into them.

torch unpickles `.metadata` and sharded objects with full powers. Here they are read first with an unpickler that
knows only the classes that such files need, so that a crafted file is refused before torch or megatron-core opens it.
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from exo_megatron.errors import CheckpointError

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
    """The pickle names something that a checkpoint does not need."""


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
    """The index of a `torch_dist` directory: tensors, their chunks, and where the chunks lie.

    Raises CheckpointError if the file is missing or damaged, if it calls for anything but the classes of an index
    (nothing of it has run then), or if it points to a file outside of the directory.
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
    """Read what else megatron-core unpickles, with torch's weights-only unpickler: `common.pt` and sharded objects.

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
    """The tensors of an index by key, without the sharded objects."""
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
