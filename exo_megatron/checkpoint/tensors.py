"""Random access to the global tensors of a checkpoint, whatever topology saved them. One process, no collectives."""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from exo_megatron.checkpoint.unpickling import read_metadata, tensor_entries
from exo_megatron.errors import CheckpointError


class StoredTensors:
    """The tensors below one `weights/` directory, read chunk by chunk when asked for."""

    def __init__(self, weights: Path) -> None:
        """Read the index. Raises CheckpointError if it is missing, damaged or refused."""
        metadata = read_metadata(weights)
        self._weights = weights
        self._entries = tensor_entries(metadata)
        self._storage = metadata.storage_data

    def keys(self) -> list[str]:
        """Keys of all tensors, sorted."""
        return sorted(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of a tensor, with its stacked axes."""
        return tuple(self._entries[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Element type of a tensor."""
        return self._entries[key].properties.dtype

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """The tensor at `index` of its leading (stacked) axes, on the CPU, of shape `shape(key)[len(index):]`.

        Reads only the chunks that overlap it. Raises CheckpointError if they do not cover it or cannot be read.
        """
        shape = self.shape(key)
        start = (*index, *(0 for _ in shape[len(index) :]))
        size = (*(1 for _ in index), *shape[len(index) :])
        result = torch.empty(size, dtype=self.dtype(key))
        covered = 0
        for chunk in self._entries[key].chunks:
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

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._storage[MetadataIndex(key, chunk.offsets)]
        path = self._weights / info.relative_path
        try:
            with open(path, "rb") as file:
                file.seek(info.offset)
                data = torch.load(io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise _bad_chunk(path, key, " ".join(str(error).split())[:160]) from None
        if not isinstance(data, Tensor) or tuple(data.shape) != tuple(chunk.sizes):
            raise _bad_chunk(path, key, f"a {type(data).__name__} of another shape than the index says")
        return data


def _overlap(
    chunk: ChunkStorageMetadata, start: tuple[int, ...], size: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a chunk and a region meet, as slices of the chunk and of the region; None if they do not."""
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
