"""Reader of a distributed checkpoint's tensor files that compares every record it reads with its checksum.

So what is loaded is verified without a second reading of the files, and a rank reads the records
that it needs and no others.
"""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from exo_megatron.checkpoint.directory import (
    MANIFEST_FILE,
    RECORDS_SUFFIX,
    WEIGHTS_DIRECTORY,
    Manifest,
    check_file,
    holds_tensors,
    weights_path,
)
from exo_megatron.errors import CheckpointError
from exo_megatron.utils.files import read_json

Records = Mapping[str, Mapping[int, tuple[int, str]]]
"""File in `weights/` -> offset of a record -> its length in bytes and its SHA-256."""


def read_records(checkpoint: Path, manifest: Manifest) -> Records | None:
    """Read the checksums of all records; None if the checkpoint was made by a version without them.

    Raises CheckpointError if a list of them is not the one that the manifest names.
    """
    names = [name for name in manifest.files if holds_tensors(name)]
    if any(f"{name}{RECORDS_SUFFIX}" not in manifest.files for name in names):
        return None
    return {name.removeprefix(f"{WEIGHTS_DIRECTORY}/"): _records_of(checkpoint, manifest, name) for name in names}


def _records_of(checkpoint: Path, manifest: Manifest, name: str) -> dict[int, tuple[int, str]]:
    path = f"{name}{RECORDS_SUFFIX}"
    check_file(checkpoint, path, manifest.files[path])
    return {offset: (length, digest) for offset, length, digest in read_json(checkpoint / path)}


class ShardReader(FileSystemReader):
    """torch's reader, which verifies records and reads each once, however many parts of it are asked for.

    records: None to read without verifying.
    """

    def __init__(self, checkpoint: Path, records: Records | None) -> None:
        super().__init__(weights_path(checkpoint))
        self._checkpoint = checkpoint
        self._records = records

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors of this rank's plan. torch calls it on every rank. Raises CheckpointError."""
        by_file: dict[str, dict[MetadataIndex, list[ReadItem]]] = defaultdict(lambda: defaultdict(list))
        for item in plan.items:
            by_file[self.storage_data[item.storage_index].relative_path][item.storage_index].append(item)
        for name, items in by_file.items():
            path = weights_path(self._checkpoint) / name
            with open(path, "rb", buffering=0) as file:
                for index in sorted(items, key=lambda index: int(self.storage_data[index].offset)):
                    info = self.storage_data[index]
                    file.seek(info.offset)
                    data = bytearray(info.length)
                    if file.readinto(data) != info.length:
                        raise _damaged(path, index, "is cut off")
                    self._check(path, name, index, data)
                    _hand_over(data, items[index], planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _check(self, path: Path, name: str, index: MetadataIndex, data: bytearray) -> None:
        if self._records is None:
            return
        info = self.storage_data[index]
        expected = self._records[name].get(info.offset)
        if expected is None or expected != (info.length, hashlib.sha256(data).hexdigest()):
            raise _damaged(path, index, "is corrupt")


def _hand_over(data: bytearray, items: list[ReadItem], planner: LoadPlanner) -> None:
    """Give a record's parts to those that asked for them."""
    if items[0].type == LoadItemType.BYTE_IO:
        for item in items:
            planner.load_bytes(item, io.BytesIO(data))
        return
    tensor: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{items[0].storage_index.fqn} is a {type(tensor).__name__}")
    for item in items:
        part = tensor
        for axis, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            part = part.narrow(axis, offset, length)
        target = planner.resolve_tensor(item).detach()
        target.copy_(part.view(target.shape))
        planner.commit_tensor(item, target)


def _damaged(path: Path, index: MetadataIndex, problem: str) -> CheckpointError:
    return CheckpointError(
        str(path),
        f"{index.fqn} {problem}",
        expected=f"the bytes that {MANIFEST_FILE} stands for",
        fix="copy the file again from where it is whole, or use another checkpoint",
    )
