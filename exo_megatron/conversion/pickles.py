"""Conversion of pickled HF weights (`pytorch_model*.bin`) to safetensors.

No code in a pickle is run: torch's weights-only reader is used.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from exo_megatron.conversion.hf_reader import INDEX_FILE, PICKLES, SINGLE_FILE
from exo_megatron.errors import CheckpointError, DataError
from exo_megatron.utils.files import read_json, write_json

PICKLE_INDEX = "pytorch_model.bin.index.json"

PART_BYTES = 2 * 10**9
"""Largest safetensors file in bytes. One is in memory at a time; a tensor is never divided."""


@dataclass(frozen=True)
class PickledPart:
    """Tensors of one pickle that go to one safetensors file."""

    source: Path
    names: tuple[str, ...]
    bytes: int


def plan_parts(directory: Path, limit: int = PART_BYTES) -> list[PickledPart]:
    """Read all pickles of an HF checkpoint and divide their tensors among files.

    Raises CheckpointError for a file that is missing, damaged or asks for code, for content other
    than tensors, and for a name that occurs twice.
    """
    parts: list[PickledPart] = []
    seen: dict[str, Path] = {}
    for path in _files(directory):
        names: list[str] = []
        used = 0
        for name, tensor in read_pickle(path).items():
            if name in seen:
                raise _wrong(path, f"holds {name}, as {seen[name].name} does", "every tensor in one file")
            seen[name] = path
            if names and used + tensor.nbytes > limit:
                parts.append(PickledPart(path, tuple(names), used))
                names, used = [], 0
            names.append(name)
            used += tensor.nbytes
        if names:
            parts.append(PickledPart(path, tuple(names), used))
    if not parts:
        raise _wrong(directory, f"holds no {PICKLES}", "the weights of a model")
    return parts


def write_parts(parts: Sequence[PickledPart], target: Path) -> None:
    """Write every part to a safetensors file in `target`, and an index if there are several."""
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file_name = SINGLE_FILE if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = read_pickle(part.source)
        try:
            save_file(_unshared({name: tensors[name] for name in part.names}), target / file_name, {"format": "pt"})
        except SafetensorError as error:  # safetensors raises it for an OSError
            raise OSError(str(error)) from error
        weight_map |= dict.fromkeys(part.names, file_name)
    if len(parts) > 1:
        total = sum(part.bytes for part in parts)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(target / INDEX_FILE, index)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of one file, mapped from it if it is an archive.

    Raises CheckpointError for content other than a dict of dense tensors.
    """
    try:
        # Files of torch before 1.6 are not archives and cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise _wrong(
            path,
            f"is refused, nothing of it was run ({' '.join(str(error).split())[:160]})",
            "a pickle of tensors only",
        ) from None
    except Exception as error:  # a damaged archive raises exceptions of many types
        raise _wrong(path, f"cannot be read ({type(error).__name__}: {error})", "a whole file") from None
    if not isinstance(content, dict) or not content:
        raise _wrong(path, f"holds a {type(content).__name__}", "a dict of tensors by name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise _wrong(path, f"holds {name!r}, a {type(value).__name__}", "a dict of dense tensors by name")
    return dict(content)


def _files(directory: Path) -> list[Path]:
    index = directory / PICKLE_INDEX
    if not index.is_file():
        return sorted(directory.glob(PICKLES))
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        paths = [directory / Path(name).name for name in names]
    except (DataError, KeyError, TypeError, AttributeError):
        raise _wrong(index, "is not an index of shards", '{"weight_map": {tensor: file name}}') from None
    for path in paths:
        if not path.is_file():
            raise _wrong(path, "is missing", f"the shard that {PICKLE_INDEX} names")
    return paths


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as safetensors needs them: contiguous, each in its own storage."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        separate[name] = (
            tensor if alone and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)
        )
        seen.add(storage.data_ptr())
    return separate


def _wrong(path: Path, problem: str, expected: str) -> CheckpointError:
    return CheckpointError(
        str(path), problem, expected=expected, fix="get the weights again, if possible as safetensors"
    )
