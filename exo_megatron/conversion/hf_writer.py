"""Writing of HF checkpoints: safetensors, in shards with an index above a size limit.

One entry's tensors are in memory at a time, besides those that are read ahead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exo_megatron.conversion.hf_reader import INDEX_FILE, SAFETENSORS_DTYPES, SINGLE_FILE
from exo_megatron.conversion.rules import Entry
from exo_megatron.utils.files import write_json

SHARD_BYTES = 5 * 10**9
"""Largest shard in bytes, as in transformers. A tensor is never divided."""

_HF_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_CONFIG_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class ExportEntry:
    """An entry of the checkpoint and the type of its HF tensors."""

    entry: Entry
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the HF tensors."""
        return sum(_size(shape) for shape in self.entry.sources.values()) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One safetensors file to be written."""

    file_name: str
    entries: tuple[ExportEntry, ...]


def plan_shards(entries: Sequence[ExportEntry], limit: int = SHARD_BYTES) -> list[Shard]:
    """Divide entries, in their order, among files of about the same size.

    A file has at most `limit` bytes, except if it holds one larger entry alone.
    """
    total = sum(entry.bytes for entry in entries)
    count = -(-total // limit)
    while any(len(group) > 1 and sum(entry.bytes for entry in group) > limit for group in _cut(entries, count)):
        count += 1
    groups = _cut(entries, count)
    if len(groups) == 1:
        return [Shard(SINGLE_FILE, _aligned(groups[0]))]
    count = len(groups)
    return [
        Shard(f"model-{number:05d}-of-{count:05d}.safetensors", _aligned(group))
        for number, group in enumerate(groups, start=1)
    ]


def write_shard(
    directory: Path, shard: Shard, tensors: Iterator[Sequence[Tensor]], count: Callable[[int], None]
) -> None:
    """Write one file and flush it to the disk.

    Args:
        directory: directory of the file.
        shard: the file's name and entries.
        tensors: HF tensors of each of these entries, contiguous. They are dropped once written.
        count: called with the bytes of each entry that has been written.
    """
    with open(directory / shard.file_name, "wb") as file:
        file.write(_header(shard))
        for item in shard.entries:
            _write_entry(file, item, next(tensors))
            count(item.bytes)
        file.flush()
        os.fsync(file.fileno())


def _cut(entries: Sequence[ExportEntry], count: int) -> list[list[ExportEntry]]:
    """Divide entries into at most `count` groups that are not empty.

    All bytes are divided into `count` equal parts; an entry belongs to the part that holds its
    middle.
    """
    total = sum(entry.bytes for entry in entries)
    groups: list[list[ExportEntry]] = [[] for _ in range(count)]
    before = 0
    for entry in entries:
        groups[(2 * before + entry.bytes) * count // (2 * total)].append(entry)
        before += entry.bytes
    return [group for group in groups if group]


def _write_entry(file: BufferedWriter, item: ExportEntry, tensors: Sequence[Tensor]) -> None:
    for (name, shape), tensor in zip(item.entry.sources.items(), tensors, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != item.dtype:
            raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype}, planned {shape} {item.dtype}")
        file.write(memoryview(tensor.view(torch.uint8).numpy().data))


def write_index(directory: Path, shards: Sequence[Shard]) -> None:
    """Write the index of several shards; a single file has none."""
    if len(shards) == 1:
        return
    weight_map = {name: shard.file_name for shard in shards for name, _, _ in _planned(shard)}
    total = sum(entry.bytes for shard in shards for entry in shard.entries)
    write_json(
        directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )


def exported_config(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json of the export: the original with the weights' type, under its own keys.

    `_name_or_path` is left out where it is a path on the machine that made the original.
    """
    keys = config.keys() & {"dtype", "torch_dtype"} or {"dtype"}
    kept = {key: value for key, value in config.items() if key != "_name_or_path" or not _is_local(value)}
    return {**kept, **dict.fromkeys(keys, _CONFIG_NAMES[dtype])}


def _is_local(name: object) -> bool:
    """Tell a path from the name of a model on a hub, which has at most one slash."""
    return isinstance(name, str) and (name.startswith(("/", ".", "~")) or name.count("/") > 1)


def _aligned(entries: Sequence[ExportEntry]) -> tuple[ExportEntry, ...]:
    # Wider types come first, so that every tensor begins at a multiple of its element size.
    return tuple(sorted(entries, key=lambda entry: -entry.dtype.itemsize))


def _planned(shard: Shard) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    for item in shard.entries:
        for name, shape in item.entry.sources.items():
            yield name, shape, item.dtype


def _header(shard: Shard) -> bytes:
    """Write the header of a safetensors file.

    It is the length (8 bytes, little endian) and the JSON, padded with spaces to a multiple of 8.
    """
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape, dtype in _planned(shard):
        end = position + _size(shape) * dtype.itemsize
        fields[name] = {"dtype": _HF_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
