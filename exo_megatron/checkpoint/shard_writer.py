"""Writer of a distributed checkpoint's tensor files in torch's format, at the disk's speed.

It replaces the loop of torch's FileSystemWriter, which holds the last tensor of every key in memory
until the file is complete, and makes a tensor only when the previous one has been given to the
disk. Here the next tensor is made (read, joined, copied from the GPU) while the last is written,
and no other tensors are in memory. The SHA-256 of the file, for the manifest, and of every tensor's
record, for who reads only some of them, are computed from the bytes as they are written; the CRC-32
that torch would store beside them is left out, as torch never reads it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystem, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from exo_megatron.checkpoint.directory import RECORDS_SUFFIX, FileRecord
from exo_megatron.utils.ahead import made_ahead
from exo_megatron.utils.files import write_json

_LONG_WRITE = 2**20
"""Bytes from which a second thread pays for the checksum."""


class ShardWriter(FileSystemWriter):
    """torch's synchronous writer, one file per rank, which raises the OSError that made it fail.

    written: name -> checksum and size of the file that this rank has written.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory, thread_count=1, sync_files=True)
        self._files = _RecordingFileSystem()
        self.fs = self._files
        self.written: dict[str, FileRecord] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's plan to its file. torch calls it on every rank."""
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        try:
            with _without_crc32(), self._files.create_stream(Path(self.path) / name, "wb") as file:
                results = list(_write_items(file, name, plan, planner))
                file.flush()
                os.fsync(file.fileno())
            write_json(Path(self.path) / f"{name}{RECORDS_SUFFIX}", file.records)
        except RuntimeError as error:
            if self._files.failures:
                raise self._files.failures[0] from error
            raise
        self.written[name] = file.record()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _write_items(file: _RecordingFile, name: str, plan: SavePlan, planner: SavePlanner) -> Iterator[WriteResult]:
    objects = [item for item in plan.items if item.type == WriteItemType.BYTE_IO]
    tensors = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
    for item in objects:
        yield _write(file, name, item, planner.resolve_data(item))
    made = made_ahead((_size(item), partial(_make, planner, item)) for item in tensors)
    for item in tensors:
        yield _write(file, name, item, next(made))


def _write(file: _RecordingFile, name: str, item: WriteItem, data: Any) -> WriteResult:
    offset = file.tell()
    if isinstance(data, Tensor):
        torch.save(data, file)
    else:
        file.write(data.getbuffer())
    length = file.tell() - offset
    file.end_record(offset, length)
    return WriteResult(index=item.index, size_in_bytes=length, storage_data=_StorageInfo(name, offset, length))


def _make(planner: SavePlanner, item: WriteItem) -> Tensor:
    data = planner.resolve_data(item)
    assert isinstance(data, Tensor)
    data = data.detach().cpu()
    # torch.save writes the whole storage, of which a view is only a part.
    return data if data.untyped_storage().nbytes() == data.nbytes else data.clone()


def _size(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.size.numel() * item.tensor_data.properties.dtype.itemsize


class _RecordingFile(BufferedWriter):
    """A file that computes its checksum, and records failed writes instead of raising.

    torch's zip writer calls `write` from C++, where an exception is lost (an error about file
    positions comes instead) and can leave the interpreter damaged.
    """

    def __init__(self, path: Path, failures: list[OSError]) -> None:
        super().__init__(FileIO(path, "wb"))
        self._failures = failures
        self._hash, self._hash_of_record = hashlib.sha256(), hashlib.sha256()
        self._bytes = 0
        self.records: list[tuple[int, int, str]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sha256")

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self._failures:
            return size
        if size < _LONG_WRITE:
            self._update(data)
            self._try_to_write(data)
        else:
            hashed = self._thread.submit(self._update, data)
            self._try_to_write(data)
            hashed.result()
        self._bytes += size
        return size

    def end_record(self, offset: int, length: int) -> None:
        """Note the checksum of what has been written since the last record."""
        self.records.append((offset, length, self._hash_of_record.hexdigest()))
        self._hash_of_record = hashlib.sha256()

    def record(self) -> FileRecord:
        """Return the checksum and size of what has been written, if nothing has failed."""
        return FileRecord(sha256=self._hash.hexdigest(), bytes=self._bytes)

    def close(self) -> None:
        self._thread.shutdown()
        super().close()

    def _update(self, data: Any) -> None:
        self._hash.update(data)
        self._hash_of_record.update(data)

    def _try_to_write(self, data: Any) -> None:
        try:
            super().write(data)
        except OSError as error:
            self._failures.append(error)


class _RecordingFileSystem(FileSystem):
    """Local files, and the failures to write them."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[OSError] = []

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with _RecordingFile(Path(path), self.failures) as file:
            yield file
            if self.failures:
                raise self.failures[0]


@contextmanager
def _without_crc32() -> Iterator[None]:
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)
