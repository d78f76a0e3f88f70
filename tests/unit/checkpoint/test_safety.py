"""Crafted checkpoints are refused before anything in them runs."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from exo_megatron.checkpoint.load import load_sharded
from exo_megatron.checkpoint.safety import FORCE_UNSAFE
from exo_megatron.checkpoint.tensors import StoredTensors
from exo_megatron.errors import CheckpointError
from tests.unit.checkpoint.conftest import Saver


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.trace,)


def index_of(path: Path) -> Any:
    return pickle.loads((path / "weights" / ".metadata").read_bytes())  # noqa: S301 - written by the test itself


def template() -> dict[str, Any]:
    return {"embedding": ShardedTensor.from_rank_offsets("embedding", torch.zeros(4, 3))}


def read(path: Path) -> None:
    load_sharded(path, template(), None)


def read_directly(path: Path) -> None:
    StoredTensors(path / "weights").read("embedding")


@pytest.mark.parametrize("reader", [read, read_directly])
def test_bomb_in_the_index(save: Saver, tmp_path: Path, reader: Callable[[Path], None]) -> None:
    path = save(tmp_path / "model")
    reader(path)
    metadata = index_of(path)
    metadata.planner_data = Bomb(tmp_path / "ran")
    (path / "weights" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"is refused, nothing of it was run: it calls for [\w.]+"):
        reader(path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))  # noqa: S301 - on purpose
    assert (tmp_path / "ran").exists(), "the bomb must be live for this test to mean anything"


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "torch.hub.load", "builtins.getattr"])
def test_names_that_the_index_may_not_use(save: Saver, tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "model")
    module, _, function = name.rpartition(".")
    (path / "weights" / ".metadata").write_bytes(f"c{module}\n{function}\n(S'x'\ntR.".encode())
    with pytest.raises(CheckpointError, match=f"it calls for {name}"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"\x80", b"no pickle at all", pickle.dumps({"state_dict_metadata": {}})])
def test_index_that_is_none(save: Saver, tmp_path: Path, content: bytes) -> None:
    path = save(tmp_path / "model")
    (path / "weights" / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: cannot be read"):
        read(path)


def test_bomb_in_a_sharded_object(save: Saver, tmp_path: Path) -> None:
    path = save(tmp_path / "model")
    metadata = index_of(path)
    index = next(index for index in metadata.storage_data if index.fqn.startswith("optimizer.steps"))
    payload = io.BytesIO()
    torch.save([Bomb(tmp_path / "ran")], payload)
    info = metadata.storage_data[index]
    info.relative_path, info.offset, info.length = "__9_0.distcp", 0, len(payload.getvalue())
    (path / "weights" / "__9_0.distcp").write_bytes(payload.getvalue())
    (path / "weights" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"__9_0.distcp: is refused, nothing of it was run: optimizer.steps"):
        read(path)
    assert not (tmp_path / "ran").exists()


def test_bomb_in_the_common_state(save: Saver, tmp_path: Path) -> None:
    path = save(tmp_path / "model")
    torch.save({"groups": Bomb(tmp_path / "ran")}, path / "weights" / "common.pt")
    with pytest.raises(CheckpointError, match=r"common.pt: is refused"):
        read(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("where", ["../outside.distcp", "/etc/hostname", "a/b.distcp"])
def test_files_outside_are_refused(save: Saver, tmp_path: Path, where: str) -> None:
    path = save(tmp_path / "model")
    metadata = index_of(path)
    next(iter(metadata.storage_data.values())).relative_path = where
    (path / "weights" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside of the directory"):
        read(path)


def test_environment_that_turns_safety_off(save: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "model")
    monkeypatch.setenv(FORCE_UNSAFE, "0")
    read(path)
    monkeypatch.setenv(FORCE_UNSAFE, "1")
    with pytest.raises(CheckpointError, match=f"unset {FORCE_UNSAFE}"):
        read(path)
