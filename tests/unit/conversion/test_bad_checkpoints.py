"""Each bad checkpoint gives one line that names what is wrong, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests.unit.conversion.conftest import make_hf
from tools import convert_hf_to_megatron, convert_megatron_to_hf

Damage = Callable[[Path], object]


def run(program: Callable[[list[str]], int], **arguments: Path) -> int:
    """Exit code of a tool. One that fails leaves its process group to the end of the process, which here goes on."""
    try:
        return program([word for name, value in arguments.items() for word in (f"--{name}", str(value))])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def shards(hf: Path) -> list[Path]:
    return sorted(hf.glob("*.safetensors"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def missing_shard(hf: Path) -> None:
    shards(hf)[1].unlink()


def truncated(hf: Path) -> None:
    path = shards(hf)[0]
    path.write_bytes(path.read_bytes()[:-10])


def not_safetensors(hf: Path) -> None:
    shards(hf)[0].write_bytes(b"\x80\x02pickle")


def missing_tensor(hf: Path) -> None:
    edit_tensors(shards(hf)[0], lambda tensors: tensors.pop("model.embed_tokens.weight"))


def missing_tensor_and_entry(hf: Path) -> None:
    missing_tensor(hf)
    edit_json(hf / "model.safetensors.index.json", lambda v: v["weight_map"].pop("model.embed_tokens.weight"))


def extra_tensor(hf: Path) -> None:
    edit_tensors(shards(hf)[0], lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm": torch.ones(16)}))


def wrong_shape(hf: Path) -> None:
    edit_tensors(shards(hf)[0], lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(99, 64)}))


def quantised(hf: Path) -> None:
    edit_tensors(
        shards(hf)[0], lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(101, 64).char()})
    )


def mixed_types(hf: Path) -> None:
    for path in shards(hf):
        edit_tensors(path, lambda tensors: tensors.update({k: t.half() for k, t in tensors.items() if "q_proj" in k}))


def pickle_only(hf: Path) -> None:
    for path in [*shards(hf), hf / "model.safetensors.index.json"]:
        path.unlink()
    (hf / "pytorch_model.bin").write_bytes(b"\x80\x02")


def no_weights(hf: Path) -> None:
    for path in [*shards(hf), hf / "model.safetensors.index.json"]:
        path.unlink()


def index_outside(hf: Path) -> None:
    edit_json(hf / "model.safetensors.index.json", lambda v: v["weight_map"].update({"lm_head.weight": "../x"}))


BAD: dict[str, tuple[Damage, str]] = {
    "missing shard": (missing_shard, r"model-00002-of-\d+.safetensors: is missing; expected the shard that"),
    "truncated shard": (truncated, r"model-00001-of-\d+.safetensors: is truncated or not safetensors"),
    "garbage": (not_safetensors, r"model-00001-of-\d+.safetensors: is truncated or not safetensors"),
    "index names a missing tensor": (missing_tensor, r"has no tensor model.embed_tokens.weight; expected the tensors"),
    "missing tensor": (missing_tensor_and_entry, r"has no tensor model.embed_tokens.weight; .*shape \[101, 64\]"),
    "extra tensor": (extra_tensor, r"holds model.layers.0.self_attn.q_norm \[16\]"),
    "wrong shape": (wrong_shape, r"embed_tokens.weight has shape \[99, 64\]; expected shape \[101, 64\]"),
    "quantised": (quantised, r"embed_tokens.weight is of type I8; expected weights of type F32, BF16, F16"),
    "mixed types": (mixed_types, r"q_proj.weight is torch.float16 but .* is torch.float32"),
    "pickle only": (pickle_only, r"pytorch_model.bin: is a pickle.*python tools/pickle_to_safetensors.py --hf"),
    "no weights": (no_weights, r"holds no weights"),
    "index points outside": (index_outside, r"index.json: is not an index of safetensors shards"),
    "broken index": (lambda hf: (hf / "model.safetensors.index.json").write_text("{"), r"is not an index"),
    "broken config": (lambda hf: (hf / "config.json").write_text("{"), r"config.json: is not JSON"),
    "config is a list": (lambda hf: (hf / "config.json").write_text("[]"), r"config.json: is a list"),
    "no config": (lambda hf: (hf / "config.json").unlink(), r"config.json: cannot be read \(No such file"),
    "unknown family": (
        lambda hf: edit_json(hf / "config.json", lambda v: v.update(model_type="mamba")),
        r"config.json: model_type is 'mamba'; expected model_type: one of llama",
    ),
    "more layers than weights": (
        lambda hf: edit_json(hf / "config.json", lambda v: v.update(num_hidden_layers=3)),
        r"has no tensor model.layers.2.input_layernorm.weight",
    ),
    "fewer layers than weights": (
        lambda hf: edit_json(hf / "config.json", lambda v: v.update(num_hidden_layers=1)),
        r"holds model.layers.1",
    ),
    "tied by mistake": (
        lambda hf: edit_json(hf / "config.json", lambda v: v.update(tie_word_embeddings=True)),
        r"lm_head.weight differs from model.embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    damage, message = BAD[kind]
    hf = make_hf(tmp_path / "hf", shard="60KB")
    damage(hf)
    assert run(convert_hf_to_megatron.main, hf=hf, output=tmp_path / "checkpoint") == 2
    (line,) = (text for text in capsys.readouterr().err.splitlines() if text.startswith("exo-megatron:"))
    assert re.search(message, line), line
    assert [child.name for child in tmp_path.iterdir()] == ["hf"]


def test_output_that_is_not_empty(tmp_path: Path, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "checkpoint"
    assert run(convert_hf_to_megatron.main, hf=hf, output=output) == 0
    manifest = (output / "manifest.json").read_text()
    assert run(convert_hf_to_megatron.main, hf=hf, output=output) == 2
    assert "already holds a complete output" in capsys.readouterr().err
    assert (output / "manifest.json").read_text() == manifest
    assert run(convert_megatron_to_hf.main, checkpoint=output, output=hf) == 2
    assert "is not empty" in capsys.readouterr().err


def test_export_of_what_is_no_checkpoint(tmp_path: Path, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(convert_megatron_to_hf.main, checkpoint=hf, output=tmp_path / "out") == 2
    assert "is an HF checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_interrupted_conversion_starts_clean(tmp_path: Path, hf: Path) -> None:
    leftover = tmp_path / "tmp-checkpoint"
    (leftover / "weights").mkdir(parents=True)
    (leftover / "weights" / "__0_0.distcp").write_bytes(b"half")
    assert run(convert_hf_to_megatron.main, hf=hf, output=tmp_path / "checkpoint") == 0
    assert not leftover.exists()
