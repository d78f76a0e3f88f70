"""A checkpoint comes back as it was saved, and what does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from exo_megatron.checkpoint.directory import list_files, read_fingerprint, read_spec, read_step, tokenizer_path
from exo_megatron.checkpoint.load import load_sharded, read_trainer_state
from exo_megatron.checkpoint.safety import verify_checkpoint, verify_together
from exo_megatron.checkpoint.tensors import StoredTensors
from exo_megatron.errors import CheckpointError
from tests.unit.checkpoint.conftest import SPEC, Saver, sharded


def empty_like(state: dict[str, Any]) -> dict[str, Any]:
    """The template with zeros for tensors and nothing for objects."""
    for value in state.values():
        if isinstance(value, ShardedTensor):
            value.data = torch.zeros_like(value.data)
    state["optimizer"]["steps"].data = None
    state["optimizer"].pop("groups")
    return state


def test_everything_comes_back(save: Saver, tmp_path: Path) -> None:
    path = save(tmp_path / "step-00000003", value=2.0, step=3)
    loaded = load_sharded(path, empty_like(sharded()), None)
    torch.testing.assert_close(loaded["layer1"], torch.arange(6.0, 12.0) * 2, rtol=0, atol=0)
    assert loaded["embedding"].dtype == torch.bfloat16
    assert loaded["embedding"].unique().tolist() == [2.0]
    assert loaded["optimizer"] == {
        "steps": {"count": 7, "scale": 2.0},
        "groups": [{"lr": 0.5, "betas": [0.9, 0.95]}],
    }
    assert "linear._extra_state" not in loaded
    assert read_trainer_state(path) == {"step": 3}
    assert read_spec(path) == SPEC
    assert read_step(path) == 3


def test_files_of_the_checkpoint(save: Saver, tmp_path: Path) -> None:
    path = save(tmp_path / "model")
    assert [child.name for child in sorted(tokenizer_path(path).iterdir())] == [
        "chat_template.jinja",
        "config.json",
        "tokenizer.json",
    ]
    assert {"model.json", "weights/.metadata", "weights/common.pt", "weights/__0_0.distcp"} <= set(list_files(path))
    assert not (tmp_path / "tmp-model").exists()
    assert not (tmp_path / "latest").exists()
    with pytest.raises(CheckpointError, match="expected a training checkpoint"):
        read_trainer_state(path)


def test_target_dtype_wins(save: Saver, tmp_path: Path) -> None:
    path = save(tmp_path / "model", value=1.5)
    template = {"embedding": ShardedTensor.from_rank_offsets("embedding", torch.zeros(4, 3, dtype=torch.float32))}
    assert load_sharded(path, template, None)["embedding"].tolist() == [[1.5] * 3] * 4


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("embedding", (5, 3), r"embedding has shape \[4, 3\]; expected shape \[5, 3\]"),
        ("output_layer.weight", (4, 3), r"has no tensor output_layer.weight; expected output_layer.weight of shape"),
    ],
)
def test_misfit_is_named(save: Saver, tmp_path: Path, key: str, shape: tuple[int, int], message: str) -> None:
    path = save(tmp_path / "model")
    # As megatron-core marks embeddings; it would fill the difference with zeros without a word.
    template = {"x": ShardedTensor.from_rank_offsets(key, torch.zeros(shape), allow_shape_mismatch=True)}
    with pytest.raises(CheckpointError, match=message):
        load_sharded(path, template, None)


def test_missing_object_is_an_error_of_ours(save: Saver, tmp_path: Path) -> None:
    path = save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="rng"):
        load_sharded(path, {"rng": ShardedObject("rng", None, (1,), (0,))}, None)


def test_fingerprint_names_the_weights_only(save: Saver, tmp_path: Path) -> None:
    first, again = save(tmp_path / "a"), save(tmp_path / "b")
    other = save(tmp_path / "c", value=1.5)
    assert read_fingerprint(first) == read_fingerprint(again) != read_fingerprint(other)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["weights/__0_0.distcp", "weights/.metadata", "model.json", "hf/tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named(save: Saver, tmp_path: Path, name: str, damage: str) -> None:
    path = save(tmp_path / "model")
    verify_checkpoint(path)
    verify_together(path)
    if damage == "flip":
        flip_bit(path / name)
    elif damage == "truncate":
        (path / name).write_bytes((path / name).read_bytes()[:-1])
    else:
        (path / name).unlink()
    problem = {"flip": "is corrupt", "truncate": "bytes; expected", "remove": "is missing"}[damage]
    for verify in (verify_checkpoint, verify_together):
        with pytest.raises(CheckpointError, match=problem) as caught:
            verify(path)
        assert caught.value.where == str(path / name)


def test_stray_weight_file_is_refused(save: Saver, tmp_path: Path) -> None:
    path = save(tmp_path / "model")
    (path / "weights" / "__7_0.distcp").write_bytes(b"from another save")
    with pytest.raises(CheckpointError, match=r"__7_0.distcp: does not belong"):
        verify_checkpoint(path)


def test_damaged_step_offers_the_older_one(save: Saver, tmp_path: Path) -> None:
    older, newer = (save(tmp_path / f"step-{step:08d}", step=step) for step in (1, 2))
    flip_bit(newer / "weights" / "__0_0.distcp")
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(newer)
    assert caught.value.fix.endswith(f"the next older one is {older}")
    flip_bit(older / "weights" / "__0_0.distcp")
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(older)
    assert "older" not in caught.value.fix


def test_random_access(save: Saver, tmp_path: Path) -> None:
    tensors = StoredTensors(save(tmp_path / "model") / "weights")
    assert tensors.keys() == ["embedding", "layers.weight"]
    assert (tensors.shape("layers.weight"), tensors.dtype("layers.weight")) == ((2, 6), torch.float32)
    assert tensors.read("layers.weight", (1,)).tolist() == [6.0, 7.0, 8.0, 9.0, 10.0, 11.0]
    assert tensors.read("layers.weight").tolist() == torch.arange(12.0).reshape(2, 6).tolist()
