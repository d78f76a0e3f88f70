"""Which checkpoint a path means, and that only whole ones count."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from exo_megatron.checkpoint.directory import (
    STAGING_MARKER,
    FileRecord,
    list_steps,
    make_manifest,
    read_manifest,
    read_spec,
    record_files,
    resolve_checkpoint,
    skipped_steps,
    step_directory,
    write_manifest,
)
from exo_megatron.checkpoint.save import prune
from exo_megatron.errors import CheckpointError


def complete(directory: Path, step: int | None) -> Path:
    directory.mkdir(parents=True)
    (directory / "model.json").write_text("{}")
    kind = "model" if step is None else "training"
    write_manifest(directory, make_manifest(record_files(directory, ["model.json"]), step=step, kind=kind))
    return directory


def test_newest_complete_step_by_scanning(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    first, second = (complete(step_directory(root, step), step) for step in (9, 10))
    (root / "latest").write_text("\0garbage")
    step_directory(root, 11).mkdir()
    (complete(root / "tmp-step-00000012", 12) / "manifest.json").touch()
    (complete(step_directory(root, 13), 13) / "manifest.json").write_text("{")
    complete(step_directory(root, 14), 4)
    complete(root / "copy-of-step-00000015", 15)
    assert list_steps(tmp_path) == list_steps(root) == [(9, first), (10, second)]
    assert resolve_checkpoint(tmp_path) == resolve_checkpoint(root) == second
    assert resolve_checkpoint(first) == first


def test_damaged_steps_beyond_the_newest_complete_one_are_told(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (7, 9):
        complete(step_directory(root, step), step)
    assert skipped_steps(tmp_path) == []
    (step_directory(root, 7) / "manifest.json").write_text("{")  # nobody would take it
    step_directory(root, 11).mkdir()
    (complete(step_directory(root, 13), 13) / "manifest.json").write_text("{")
    complete(step_directory(root, 14), 4)
    (complete(step_directory(root, 15), 15) / STAGING_MARKER).touch()  # a run makes or removes it
    told = skipped_steps(tmp_path)
    assert told == skipped_steps(root)
    assert [re.findall(r"step-\d+", line) for line in told] == [
        [f"step-000000{n}", "step-00000009"] for n in (11, 13, 14)
    ]
    for line, problem in zip(
        told, ["it has no manifest", "manifest.json that is damaged", "says that it is step 4"], strict=True
    ):
        assert problem in line


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "holds no complete checkpoint"),
        (lambda path: path.write_text(""), "is a file"),
        (lambda path: (path / "checkpoints").mkdir(parents=True), "has no complete checkpoint in checkpoints/"),
    ],
)
def test_nothing_there(tmp_path: Path, make: object, message: str) -> None:
    assert callable(make)
    make(tmp_path / "output")
    with pytest.raises(CheckpointError, match=message):
        resolve_checkpoint(tmp_path / "output")


def test_hf_checkpoint_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"is an HF checkpoint.*`exo-megatron import`"):
        resolve_checkpoint(tmp_path)


def test_named_checkpoint_with_a_damaged_manifest(tmp_path: Path) -> None:
    path = complete(tmp_path / "model", None)
    (path / "manifest.json").write_text(json.dumps({"fingerprint": "x"}))
    with pytest.raises(CheckpointError, match=r"manifest.json: is damaged .*files"):
        resolve_checkpoint(path)


def test_a_fingerprint_that_is_not_that_of_the_checksums(tmp_path: Path) -> None:
    manifest = read_manifest(complete(tmp_path / "model", None))
    write_manifest(tmp_path / "model", manifest.model_copy(update={"fingerprint": "0" * 64}))
    with pytest.raises(CheckpointError, match="its fingerprint is not that of its checksums"):
        read_manifest(tmp_path / "model")


@pytest.mark.parametrize("name", ["../other/secret", "/etc/passwd", "weights/../../x"])
def test_manifest_stays_inside(tmp_path: Path, name: str) -> None:
    record = FileRecord(sha256="0" * 64, bytes=1)
    write_manifest(tmp_path, make_manifest({name: record}, step=None, kind="model"))
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        read_manifest(tmp_path)


def test_foreign_model_description(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text('{"family": "llama", "wings": 2}')
    with pytest.raises(CheckpointError, match="is not the description of a model"):
        read_spec(tmp_path)


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        complete(step_directory(tmp_path, step), step)
    (tmp_path / "tmp-step-00000011").mkdir()
    for name, file in (("tmp-step-00000012", STAGING_MARKER), ("tmp-step-notes", "notes.txt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    (tmp_path / "tmp-step-notes.txt").touch()
    step_directory(tmp_path, 4).mkdir()
    prune(tmp_path, 2)
    left = ["step-00000003", "step-00000004", "step-00000010", "tmp-step-notes", "tmp-step-notes.txt"]
    assert sorted(child.name for child in tmp_path.iterdir()) == left
    prune(tmp_path, 2)
    assert [step for step, _ in list_steps(tmp_path)] == [3, 10]
