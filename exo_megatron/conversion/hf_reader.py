"""Reading of HF checkpoints: safetensors in one file or in shards with an index.

One tensor is read at a time.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exo_megatron.conversion.rules import Entry, Family
from exo_megatron.errors import CheckpointError, DataError
from exo_megatron.utils.files import check_regular_files, read_json

HF_CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

_CHUNK = 2**24
"""Bytes compared at once."""

PICKLES = "pytorch_model*.bin"
"""Names of pickled weights, which transformers wrote before safetensors."""

_OTHER_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class HfTensor:
    """The place of a tensor and its description in the file.

    Attributes:
        stored_as: the type as safetensors names it.
        start: position of its first byte in the file.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    stored_as: str
    start: int

    @property
    def dtype(self) -> torch.dtype:
        """The type. Raises CheckpointError if `check_type` refuses it."""
        self.check_type()
        return SAFETENSORS_DTYPES[self.stored_as]

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def check_type(self) -> None:
        """Raise CheckpointError unless the type is one of weights.

        Tensors that are not used may have other types.
        """
        if self.stored_as not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                str(self.path),
                f"{self.name} is of type {self.stored_as}",
                expected=f"weights of type {', '.join(SAFETENSORS_DTYPES)}",
                fix="use the unquantised weights of the model",
            )


class HfTensors:
    """The tensors of an HF checkpoint directory."""

    def __init__(self, directory: Path, family: Family | None = None) -> None:
        """Read the headers of all files.

        If `family` is given, tensors whose names lack its prefix get it; otherwise the names are
        those in the files. Raises CheckpointError, which names the file or tensor that is wrong.
        """
        self.directory = directory
        tensors = _read_headers(directory)
        if family is not None and not any(name.startswith(family.base_prefix) for name in tensors):
            tensors = {family.full_name(name): tensor for name, tensor in tensors.items()}
        self.tensors = tensors

    def read(self, name: str) -> Tensor:
        """Map one tensor from its file, on the CPU.

        No copy is made unless the tensor is unaligned in the file, and the memory is freed with the
        tensor.
        """
        tensor = self.tensors[name]
        try:
            return _map(tensor)
        except (OSError, ValueError) as error:
            raise _damaged(tensor.path, error) from None


def read_config(directory: Path) -> dict[str, Any]:
    """Read the config.json of an HF checkpoint. Raises CheckpointError if that fails."""
    if not directory.is_dir():
        raise CheckpointError(
            str(directory),
            "is not a directory" if directory.exists() else "does not exist",
            expected="the directory of an HF checkpoint",
            fix="check the path; a model of the hub has to be downloaded first",
        )
    path = directory / HF_CONFIG_FILE
    try:
        check_regular_files(directory)
        values = read_json(path)
    except DataError as error:
        raise CheckpointError(
            error.where, error.problem, expected="the files of an HF checkpoint", fix=error.fix
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(
            str(path), f"is a {type(values).__name__}", expected="a JSON object", fix="restore the file"
        )
    return values


def check_tensors(hf: HfTensors, entries: Iterable[Entry], family: Family, *, tied: bool) -> None:
    """Raise CheckpointError unless the checkpoint has exactly the tensors of the entries.

    Their shapes must agree, too. Tensors that the family ignores may be there, and a repeated
    output layer if `tied`.
    """
    expected = {name: shape for entry in entries for name, shape in entry.sources.items()}
    for name, shape in expected.items():
        if name not in hf.tensors:
            raise CheckpointError(
                str(hf.directory),
                f"has no tensor {name}",
                expected=f"{name} of shape {list(shape)}, as config.json says",
                fix="restore the missing weights, or correct config.json",
            )
        if hf.tensors[name].shape != shape:
            raise CheckpointError(
                str(hf.tensors[name].path),
                f"{name} has shape {list(hf.tensors[name].shape)}",
                expected=f"shape {list(shape)}, as config.json says",
                fix="use the config.json that belongs to these weights",
            )
        hf.tensors[name].check_type()
    for name in sorted(hf.tensors.keys() - expected.keys()):
        if family.ignores(name):
            continue
        if tied and name == family.tied_output[0]:
            _check_tied(hf, *family.tied_output)
            continue
        raise CheckpointError(
            str(hf.tensors[name].path),
            f"holds {name} {list(hf.tensors[name].shape)}, which this {family.model_type} model has not",
            expected="the tensors of the model and no others",
            fix="use the config.json that belongs to these weights, or remove the tensor",
        )


def _check_tied(hf: HfTensors, output: str, embedding: str) -> None:
    if not _same_content(hf.tensors[output], hf.tensors[embedding]):
        raise CheckpointError(
            str(hf.tensors[output].path),
            f"{output} differs from {embedding}, though config.json has tie_word_embeddings: true",
            expected="equal tensors, or tie_word_embeddings: false",
            fix="set tie_word_embeddings to false in config.json to keep both",
        )


def _same_content(one: HfTensor, other: HfTensor) -> bool:
    """Tell whether two tensors are equal bit for bit.

    They are read in parts, so that neither is in memory as a whole.
    """
    if (one.shape, one.stored_as) != (other.shape, other.stored_as):
        return False
    with open(one.path, "rb") as first, open(other.path, "rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        sizes = (min(_CHUNK, one.bytes - start) for start in range(0, one.bytes, _CHUNK))
        return all(first.read(size) == second.read(size) for size in sizes)


def _read_headers(directory: Path) -> dict[str, HfTensor]:
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if not index.is_file():
        if not single.is_file():
            raise _no_weights(directory)
        return _read_header(single)
    weight_map = _read_index(index)
    file_names = sorted(set(weight_map.values()))
    if single.is_file() and file_names != [SINGLE_FILE]:
        raise CheckpointError(
            str(directory),
            f"holds {SINGLE_FILE} beside {INDEX_FILE}, which places the weights in other files",
            expected="one of the two",
            fix=f"remove {SINGLE_FILE} to use the shards, or the index to use {SINGLE_FILE}, as transformers does",
        )
    places = dict(weight_map)
    tensors: dict[str, HfTensor] = {}
    for file_name in file_names:
        path = directory / file_name
        if not path.is_file():
            raise CheckpointError(
                str(path), "is missing", expected=f"the shard that {INDEX_FILE} names", fix="copy or download it again"
            )
        found = _read_header(path)
        for name in [name for name, where in weight_map.items() if where == file_name]:
            if name not in found:
                raise CheckpointError(
                    str(path),
                    f"has no tensor {name}",
                    expected=f"the tensors that {INDEX_FILE} places there",
                    fix="copy or download the shard and the index again",
                )
        _check_places(path, found, places)
        tensors |= found
    return tensors


def _check_places(path: Path, found: Iterable[str], places: dict[str, str]) -> None:
    """Raise CheckpointError if a tensor of this file belongs to another one.

    `places` has file names by tensor, as in the index. A tensor that the index does not name
    belongs to the file where it is found first.
    """
    for name in found:
        if places.setdefault(name, path.name) != path.name:
            raise CheckpointError(
                str(path),
                f"holds {name}, which belongs to {places[name]}",
                expected="every tensor in one file, the one that the index names",
                fix=f"remove the tensor from one of the files, or copy or download them and {INDEX_FILE} again",
            )


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = read_json(index)["weight_map"]
        well_formed = all(isinstance(name, str) and Path(name).name == name for name in weight_map.values())
    except (DataError, KeyError, TypeError, AttributeError):
        well_formed = False
    if not well_formed or not weight_map:
        raise CheckpointError(
            str(index),
            "is not an index of safetensors shards",
            expected='{"weight_map": {tensor: file name}} with files in the same directory',
            fix="copy or download it again",
        )
    tensors: dict[str, str] = weight_map
    return tensors


def _read_header(path: Path) -> dict[str, HfTensor]:
    try:
        # safe_open checks that header and file size agree, and that the tensors fill the file
        # without overlapping.
        with safe_open(str(path), framework="pt"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            fields = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None
    return {
        name: HfTensor(name, path, tuple(field["shape"]), field["dtype"], 8 + length + field["data_offsets"][0])
        for name, field in fields.items()
        if name != "__metadata__"
    }


def _map(tensor: HfTensor) -> Tensor:
    size = tensor.bytes
    if not size:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    before = tensor.start % mmap.ALLOCATIONGRANULARITY
    with open(tensor.path, "rb") as file:
        # Private and writable, because torch has no read-only tensors. No code writes to it.
        mapped = mmap.mmap(
            file.fileno(),
            before + size,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=tensor.start - before,
        )
    with contextlib.suppress(OSError):  # some file systems refuse advice
        mapped.madvise(mmap.MADV_WILLNEED)
    data = torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=before)
    if tensor.start % tensor.dtype.itemsize:
        data = data.clone()
    return data.view(tensor.dtype).reshape(tensor.shape)


def _no_weights(directory: Path) -> CheckpointError:
    expected = f"{SINGLE_FILE} or {INDEX_FILE} with its shards"
    pickles = sorted(path.name for path in directory.glob(PICKLES))
    others = sorted(path.name for pattern in _OTHER_PICKLES for path in directory.glob(pattern))
    if pickles:
        words = ["exo-megatron", "pickles", f"hf={directory}", f"output={directory}-safetensors"]
        return CheckpointError(
            str(directory / pickles[0]),
            "is a pickle, which can run code when it is loaded",
            expected=expected,
            fix=f"convert it, with nothing in it run: {shlex.join(words)}",
        )
    shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
    return CheckpointError(
        str(directory),
        f"holds no weights, only {shown}, which is not read" if others else "holds no weights",
        expected=expected,
        fix="give the directory of a complete HF checkpoint",
    )


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        str(path),
        f"is truncated or not safetensors ({error})",
        expected="a whole safetensors file",
        fix="copy or download it again",
    )
