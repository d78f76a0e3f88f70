"""Random access to the global tensors of a checkpoint that was saved at any topology.

One process, no collectives.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from exo_megatron.checkpoint.safety import read_metadata, tensor_entries
from exo_megatron.errors import CheckpointError

OPTIMIZER_PREFIX = "optimizer."
"""Keys of optimizer state in a training checkpoint; all other tensors are the model's."""


class StoredTensors:
    """The tensors below one `weights/` directory, read chunk by chunk on request."""

    def __init__(self, weights: Path) -> None:
        """Read the index. Raises CheckpointError if it is missing, damaged or refused."""
        metadata = read_metadata(weights)
        self._weights = weights
        self._entries = tensor_entries(metadata)
        self._storage = metadata.storage_data
        self._by_index: dict[tuple[str, int], Mapping[tuple[int, ...], Sequence[ChunkStorageMetadata]] | None] = {}

    def keys(self) -> list[str]:
        """List the keys of all tensors, sorted."""
        return sorted(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the global shape of a tensor, with its stacked axes."""
        return tuple(self._entries[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self._entries[key].properties.dtype

    def of_model(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of the model's own tensors by key, without the optimizer's."""
        return {key: (self.shape(key), self.dtype(key)) for key in self.keys() if not key.startswith(OPTIMIZER_PREFIX)}

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """Read the tensor at `index` of its leading (stacked) axes: `shape(key)[len(index):]`, CPU.

        Reads only the chunks that overlap it; a single chunk that is exactly this part is not
        copied. Raises CheckpointError if the chunks do not cover it or cannot be read.
        """
        shape = self.shape(key)
        start = (*index, *(0 for _ in shape[len(index) :]))
        size = (*(1 for _ in index), *shape[len(index) :])
        chunks = self._chunks_at(key, index)
        if len(chunks) == 1 and (tuple(chunks[0].offsets), tuple(chunks[0].sizes)) == (start, size):
            return self._read_chunk(key, chunks[0]).reshape(shape[len(index) :])
        result = torch.empty(size, dtype=self.dtype(key))
        covered = 0
        for chunk in chunks:
            overlap = _overlap(chunk, start, size)
            if overlap is not None:
                source, target = overlap
                result[target].copy_(self._read_chunk(key, chunk)[source])
                covered += result[target].numel()
        if covered != math.prod(size):
            raise CheckpointError(
                str(self._weights),
                f"holds {covered} of {math.prod(size)} elements of {key}{list(index) if index else ''}",
                expected="chunks that cover each tensor once",
                fix="use another checkpoint",
            )
        return result.reshape(shape[len(index) :])

    def _chunks_at(self, key: str, index: tuple[int, ...]) -> Sequence[ChunkStorageMetadata]:
        """List the chunks that may overlap the part at `index`, such as those of one expert."""
        place = (key, len(index))
        if place not in self._by_index:
            self._by_index[place] = _group(self._entries[key].chunks, len(index))
        groups = self._by_index[place]
        return self._entries[key].chunks if groups is None else groups.get(index, ())

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._storage[MetadataIndex(key, chunk.offsets)]
        path = self._weights / info.relative_path
        try:
            with open(path, "rb", buffering=0) as file:
                window = _Window(file, info.offset, info.length)
                data = torch.load(window, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise _bad_chunk(path, key, " ".join(str(error).split())[:160]) from None
        if not isinstance(data, Tensor) or tuple(data.shape) != tuple(chunk.sizes):
            raise _bad_chunk(path, key, f"a {type(data).__name__} of another shape than the index says")
        return data


class _Window(io.RawIOBase):
    """A part of a file as a file, so that torch reads a record directly into a tensor's memory."""

    def __init__(self, file: io.FileIO, start: int, size: int) -> None:
        super().__init__()
        self._file = file
        self._start = start
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the part reaches."""
        view = memoryview(buffer).cast("B")[: max(0, self._size - self._position)]
        self._file.seek(self._start + self._position)
        done = 0
        while done < len(view):
            read = self._file.readinto(view[done:])
            if not read:
                break
            done += read
        self._position += done
        return done


def _group(
    chunks: Sequence[ChunkStorageMetadata], axes: int
) -> Mapping[tuple[int, ...], Sequence[ChunkStorageMetadata]] | None:
    """Group chunks by their index on the leading axes; None if some extend over several indices."""
    groups: dict[tuple[int, ...], list[ChunkStorageMetadata]] = defaultdict(list)
    for chunk in chunks:
        if any(size != 1 for size in chunk.sizes[:axes]):
            return None
        groups[tuple(chunk.offsets[:axes])].append(chunk)
    return groups


def _overlap(
    chunk: ChunkStorageMetadata, start: tuple[int, ...], size: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Find the overlap of a chunk and a region as slices of both; None if there is none."""
    source, target = [], []
    for chunk_start, chunk_size, region_start, region_size in zip(chunk.offsets, chunk.sizes, start, size, strict=True):
        low = max(chunk_start, region_start)
        high = min(chunk_start + chunk_size, region_start + region_size)
        if low >= high:
            return None
        source.append(slice(low - chunk_start, high - chunk_start))
        target.append(slice(low - region_start, high - region_start))
    return tuple(source), tuple(target)


def _bad_chunk(path: Path, key: str, why: str) -> CheckpointError:
    return CheckpointError(
        str(path),
        f"{key} cannot be read ({why})",
        expected="the file that was saved",
        fix="copy the file again from where it is whole, or use another checkpoint",
    )
