"""Tensor files: entries of two stacked axes, and checksums that are those of the files."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.serialization import get_crc32_options

from exo_megatron.checkpoint.directory import FileRecord, record_files
from exo_megatron.checkpoint.dist_format import PlannedShard, plan_writing, planned_state
from exo_megatron.checkpoint.tensors import StoredTensors
from exo_megatron.parallel.runtime import Runtime

LAYERS, EXPERTS = 3, 5


def value(layer: int, expert: int) -> Tensor:
    return torch.arange(6.0).reshape(2, 3) + 100 * layer + 10 * expert


@pytest.fixture
def written(runtime: Runtime, tmp_path: Path) -> dict[str, FileRecord]:
    """Experts of several layers, and a tensor that is large enough for a checksum in a thread of its own."""
    places = list(itertools.product(range(LAYERS), range(EXPERTS)))
    shards = [PlannedShard("fc1", (LAYERS, EXPERTS), place, (2, 3), torch.float32) for place in places]
    shards.append(PlannedShard("embedding", (), (), (1024, 1024), torch.bfloat16))

    def produce(key: str, offset: tuple[int, ...]) -> Tensor:
        return value(*offset[:2])[None, None] if key == "fc1" else torch.ones(1024, 1024, dtype=torch.bfloat16)

    writing = plan_writing(planned_state(shards), tmp_path, produce)
    writing.write()
    return writing.end(runtime)


def test_entries_of_two_stacked_axes(written: dict[str, FileRecord], tmp_path: Path) -> None:
    stored = StoredTensors(tmp_path)
    assert stored.of_model() == {
        "embedding": ((1024, 1024), torch.bfloat16),
        "fc1": ((LAYERS, EXPERTS, 2, 3), torch.float32),
    }
    for layer, expert in itertools.product(range(LAYERS), range(EXPERTS)):
        assert torch.equal(stored.read("fc1", (layer, expert)), value(layer, expert))
    assert torch.equal(stored.read("fc1", (1,)), torch.stack([value(1, expert) for expert in range(EXPERTS)]))
    assert stored.read("fc1").shape == (LAYERS, EXPERTS, 2, 3)
    assert stored.read("embedding").unique().tolist() == [1.0]


def test_checksums_are_those_of_the_files(written: dict[str, FileRecord], tmp_path: Path) -> None:
    assert list(written) == ["__0_0.distcp"]
    assert record_files(tmp_path, written) == written
    assert get_crc32_options(), "only our own files are without CRC-32"
