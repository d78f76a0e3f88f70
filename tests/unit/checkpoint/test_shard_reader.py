"""What is loaded is verified as it is read, and nothing else is read."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from exo_megatron.checkpoint import shard_reader
from exo_megatron.checkpoint.directory import RECORDS_SUFFIX, read_manifest, weights_path, write_manifest
from exo_megatron.checkpoint.load import load_sharded, verify_but_records
from exo_megatron.checkpoint.safety import read_metadata, verify_checkpoint
from exo_megatron.errors import CheckpointError
from tests.unit.checkpoint.conftest import Saver
from tests.unit.checkpoint.test_save_load import empty_like, sharded

FILE = "weights/__0_0.distcp"


def template(key: str) -> dict[str, Any]:
    """One tensor of the checkpoint: a layer or the embedding."""
    return {key: empty_like(sharded())[key]}


def place_of(path: Path, key: str) -> tuple[int, int]:
    """Offset and length of the first record of a tensor."""
    storage = read_metadata(weights_path(path)).storage_data
    info = next(info for index, info in storage.items() if index.fqn == key)
    return info.offset, info.length


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_damaged_record_is_refused_by_name(save: Saver, tmp_path: Path, share: float) -> None:
    path = save(tmp_path / "model")
    offset, length = place_of(path, "embedding")
    flip(path / FILE, offset + int(share * length))
    records = verify_but_records(path)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: embedding is corrupt"):
        load_sharded(path, template("embedding"), records)


def test_a_record_that_is_not_read_does_no_harm(save: Saver, tmp_path: Path) -> None:
    path = save(tmp_path / "model", value=3.0)
    flip(path / FILE, place_of(path, "layers.weight")[0] + 40)
    loaded = load_sharded(path, template("embedding"), verify_but_records(path))
    assert loaded["embedding"].unique().tolist() == [3.0]
    with pytest.raises(CheckpointError, match="is corrupt"):
        verify_checkpoint(path)


@pytest.mark.parametrize("what", ["shorter", "another list"])
def test_what_is_verified_first(save: Saver, tmp_path: Path, what: str) -> None:
    path = save(tmp_path / "model")
    if what == "shorter":
        os.truncate(path / FILE, (path / FILE).stat().st_size - 1)
    else:
        flip(path / f"{FILE}{RECORDS_SUFFIX}", 20)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        verify_but_records(path)


def test_a_checkpoint_of_an_earlier_version_is_verified_whole(save: Saver, tmp_path: Path) -> None:
    """It has no checksums of records."""
    path = save(tmp_path / "model", value=3.0)
    (path / f"{FILE}{RECORDS_SUFFIX}").unlink()
    manifest = read_manifest(path)
    files = {name: record for name, record in manifest.files.items() if not name.endswith(RECORDS_SUFFIX)}
    write_manifest(path, manifest.model_copy(update={"files": files}))
    assert verify_but_records(path) is None
    assert load_sharded(path, template("embedding"), None)["embedding"].unique().tolist() == [3.0]
    flip(path / FILE, place_of(path, "layers.weight")[0] + 40)
    with pytest.raises(CheckpointError, match="is corrupt"):
        verify_but_records(path)


def test_a_record_is_read_once_for_all_its_parts(save: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank may ask for a record in several blocks."""
    path = save(tmp_path / "model", value=2.0)
    handed: Counter[str] = Counter()
    hand_over = shard_reader._hand_over

    def counted(data: bytearray, items: Any, planner: Any) -> None:
        handed[items[0].storage_index.fqn] += 1
        hand_over(data, items, planner)

    monkeypatch.setattr(shard_reader, "_hand_over", counted)
    rows = {
        f"row{row}": ShardedTensor.from_rank_offsets("embedding", torch.zeros(1, 3), (0, row, 4)) for row in range(4)
    }
    loaded = load_sharded(path, rows, verify_but_records(path))
    assert torch.cat([loaded[f"row{row}"] for row in range(4)]).unique().tolist() == [2.0]
    assert handed == {"embedding": 1}
