"""Pickled weights become safetensors without anything in them being run, whatever the model."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from exo_megatron.conversion.hf_reader import HfTensors
from exo_megatron.conversion.pickles import plan_parts, write_parts
from exo_megatron.errors import CheckpointError
from tests.unit.conversion.conftest import Imports, make_hf, tensors_of
from tools import pickle_to_safetensors

REPOSITORY = Path(__file__).parents[3]
OLD = {"_use_new_zipfile_serialization": False}


def pickled(hf: Path, *shards: dict[str, Any], options: dict[str, Any] | None = None) -> Path:
    """Put pickles in the place of the safetensors of an HF checkpoint."""
    (hf / "model.safetensors").unlink()
    for number, shard in enumerate(shards, start=1):
        name = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin" if len(shards) > 1 else "pytorch_model.bin"
        torch.save(shard, hf / name, **(options or {}))
    return hf


@pytest.mark.parametrize("options", [{}, OLD], ids=["archive", "old form"])
def test_the_command_of_the_error(tmp_path: Path, convert: Imports, export: Imports, options: dict[str, Any]) -> None:
    hf = make_hf(tmp_path / "a model's", tied=True, dtype=torch.bfloat16)
    tensors = tensors_of(hf)
    embedding = tensors["model.embed_tokens.weight"]
    pickled(hf, tensors | {"lm_head.weight": embedding}, options=options)  # one storage under two names
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: is a pickle") as raised:
        convert(hf, tmp_path / "checkpoint")
    words = shlex.split(raised.value.fix.partition(": ")[2])
    assert words[:2] == ["exo-megatron", "pickles"]
    (output,) = (Path(value) for name, _, value in (word.partition("=") for word in words) if name == "output")
    subprocess.run(
        [sys.executable, "-m", "exo_megatron", *words[1:]],
        cwd=REPOSITORY,
        check=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    back = export(convert(output, tmp_path / "checkpoint"), tmp_path / "back")
    assert tensors_of(back).keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in tensors_of(back).items())
    travelled = {path.name for path in output.iterdir()} - {"model.safetensors"}
    assert travelled == {path.name for path in hf.iterdir()} - {"pytorch_model.bin"}


def test_shards_and_tensors_of_any_model(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    weight = torch.randn(6, 4)
    first = {"transformer.a": weight.t(), "transformer.b": weight[1:3], "mask": torch.ones(3, dtype=torch.bool)}
    second = {"steps": torch.tensor(7), "half": torch.randn(5).half(), "empty": torch.zeros(0, 3)}
    pickled(hf, first, second)
    target = tmp_path / "out"
    target.mkdir()
    parts = plan_parts(hf, limit=100)
    assert [part.names for part in parts] == [
        ("transformer.a",),
        ("transformer.b", "mask"),
        ("steps", "half", "empty"),
    ]
    write_parts(parts, target)
    assert sorted(path.name for path in target.iterdir()) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    written = tensors_of(target)
    for name, tensor in (first | second).items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harm",)


BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "code": (({"a": Harmful()},), r"pytorch_model.bin: is refused, nothing of it was run"),
    "not tensors": (({"a": torch.ones(2), "step": 3},), r"pytorch_model.bin: holds 'step', a int; expected a dict of"),
    "a list": (([torch.ones(2)],), r"pytorch_model.bin: holds a list; expected a dict of tensors by name"),
    "nested": (({"model": {"a": torch.ones(2)}},), r"pytorch_model.bin: holds 'model', a dict"),
    "sparse": (({"a": torch.ones(2).to_sparse()},), r"pytorch_model.bin: holds 'a', a Tensor; .*dense"),
    "twice": (({"a": torch.ones(2)}, {"a": torch.ones(2)}), r"00002.bin: holds a, as pytorch_model-00001-of-00002.bin"),
    "none": ((), r"hf: holds no pytorch_model\*.bin"),
}


@pytest.mark.parametrize("kind", BAD)
def test_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    shards, message = BAD[kind]
    monkeypatch.chdir(tmp_path)
    hf = pickled(make_hf(tmp_path / "hf"), *shards)
    capsys.readouterr()
    assert pickle_to_safetensors.main(["--hf", str(hf), "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert [child.name for child in tmp_path.iterdir()] == ["hf"]
    assert re.search(message, line), line


def test_truncated_file_and_missing_shard(tmp_path: Path) -> None:
    hf = pickled(make_hf(tmp_path / "hf"), {"a": torch.ones(2)})
    whole = (hf / "pytorch_model.bin").read_bytes()
    (hf / "pytorch_model.bin").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: cannot be read"):
        plan_parts(hf)
    (hf / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}')
    with pytest.raises(CheckpointError, match=r"00001-of-00002.bin: is missing; expected the shard that"):
        plan_parts(hf)


def test_source_file_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = pickled(make_hf(tmp_path / "hf"), {"a": torch.ones(2)})
    (hf / "vocab.json").symlink_to("/proc/self/mem")  # the start of memory is never mapped
    capsys.readouterr()
    assert pickle_to_safetensors.main(["--hf", str(hf), "--output", str(tmp_path / "out")]) == 2
    assert "hf/vocab.json: cannot be read (Input/output error)" in capsys.readouterr().err
    assert [child.name for child in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(("rank", "lines"), [(0, 1), (1, 0)])
def test_several_processes_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int, lines: int
) -> None:
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    assert pickle_to_safetensors.main(["--hf", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.partition("; ")[0] for line in said] == [
        "exo-megatron: pickles: 2 processes were started (torchrun)"
    ] * lines


def test_output_that_is_not_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = pickled(make_hf(tmp_path / "hf"), {"a": torch.ones(2)})
    for _ in range(2):
        code = pickle_to_safetensors.main(["--hf", str(hf), "--output", str(tmp_path / "out")])
    assert code == 2
    assert "already holds a complete output (config.json)" in capsys.readouterr().err
    assert HfTensors(tmp_path / "out").tensors.keys() == {"a"}
