"""Each bad checkpoint gives one line that names what is wrong, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from exo_megatron.checkpoint.directory import STAGING_MARKER, read_spec
from exo_megatron.config.sections import ParallelConfig
from exo_megatron.config.stages import STAGE_FILES, VerifyConfig
from exo_megatron.errors import CheckpointError, TopologyError
from exo_megatron.stages import verify as verifying
from tests.reference.tiny_llama import tiny_tokenizer
from tests.unit.conversion.conftest import make_hf
from tools import convert_hf_to_megatron, convert_megatron_to_hf, verify_conversion

Damage = Callable[[Path], object]


def run(program: Callable[[list[str]], int], **arguments: Path | int) -> int:
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


def stale_tensor(hf: Path) -> None:
    edit_tensors(shards(hf)[1], lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(101, 64)}))


def twice_without_entry(hf: Path) -> None:
    missing_tensor_and_entry(hf)
    for path in shards(hf)[:2]:
        edit_tensors(path, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(101, 64)}))


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


def single_file_too(hf: Path) -> None:
    shutil.copyfile(shards(hf)[0], hf / "model.safetensors")


def other_pickles_only(hf: Path) -> None:
    no_weights(hf)
    for name in ("training_args.bin", "last.ckpt", "optimizer.pt", "model.pth"):
        (hf / name).write_bytes(b"\x80\x02")


def index_outside(hf: Path) -> None:
    edit_json(hf / "model.safetensors.index.json", lambda v: v["weight_map"].update({"lm_head.weight": "../x"}))


def larger_tokenizer(hf: Path) -> None:
    tiny_tokenizer(150).save_pretrained(hf)


BAD: dict[str, tuple[Damage, str]] = {
    "missing shard": (missing_shard, r"model-00002-of-\d+.safetensors: is missing; expected the shard that"),
    "truncated shard": (truncated, r"model-00001-of-\d+.safetensors: is truncated or not safetensors"),
    "garbage": (not_safetensors, r"model-00001-of-\d+.safetensors: is truncated or not safetensors"),
    "index names a missing tensor": (missing_tensor, r"has no tensor model.embed_tokens.weight; expected the tensors"),
    "missing tensor": (missing_tensor_and_entry, r"has no tensor model.embed_tokens.weight; .*shape \[101, 64\]"),
    "extra tensor": (extra_tensor, r"holds model.layers.0.self_attn.q_norm \[16\]"),
    "tensor in a file of no entry": (
        stale_tensor,
        r"model-00002-of-\d+.safetensors: holds model.embed_tokens.weight, which belongs to model-00001-of-",
    ),
    "tensor twice, no entry": (
        twice_without_entry,
        r"00002-of-\d+.safetensors: holds model.embed_tokens.weight, which belongs to model-00001-of",
    ),
    "wrong shape": (wrong_shape, r"embed_tokens.weight has shape \[99, 64\]; expected shape \[101, 64\]"),
    "quantised": (quantised, r"embed_tokens.weight is of type I8; expected weights of type F32, BF16, F16"),
    "mixed types": (mixed_types, r"q_proj.weight is torch.float16 but .* is torch.float32"),
    "vocabulary smaller than the tokenizer": (
        larger_tokenizer,
        r"hf: the tokenizer has 150 entries, the model 101 embedding rows; expected .* no more entries",
    ),
    "pickle only": (pickle_only, r"pytorch_model.bin: is a pickle.*exo-megatron pickles hf="),
    "no weights": (no_weights, r"holds no weights; expected model.safetensors or"),
    "other pickles only": (
        other_pickles_only,
        r"hf: holds no weights, only last.ckpt, model.pth, optimizer.pt, ..., which is not read; "
        r"expected model.safetensors or .*; fix: give the directory",
    ),
    "single file beside shards": (
        single_file_too,
        r"hf: holds model.safetensors beside model.safetensors.index.json.*fix: remove model.safetensors to use",
    ),
    "index points outside": (index_outside, r"index.json: is not an index of safetensors shards"),
    "broken index": (lambda hf: (hf / "model.safetensors.index.json").write_text("{"), r"is not an index"),
    "broken config": (lambda hf: (hf / "config.json").write_text("{"), r"config.json: is not JSON"),
    "config is a list": (lambda hf: (hf / "config.json").write_text("[]"), r"config.json: is a list"),
    "no config": (lambda hf: (hf / "config.json").unlink(), r"config.json: cannot be read \(No such file"),
    "unknown family": (
        lambda hf: edit_json(hf / "config.json", lambda v: v.update(model_type="mamba")),
        r"config.json: model_type is 'mamba'; expected model_type: one of .*llama",
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


def the_line(errors: str) -> str:
    """The one line that a command wrote to standard error: what was seen, what is expected, what to do."""
    (line,) = errors.splitlines()
    assert re.fullmatch(r"exo-megatron: .+: .+; expected .+; fix: .+", line), line
    return line


@pytest.mark.parametrize("kind", BAD)
def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    damage, message = BAD[kind]
    hf = make_hf(tmp_path / "hf", shard="60KB")
    damage(hf)
    capsys.readouterr()
    assert run(convert_hf_to_megatron.main, hf=hf, output=tmp_path / "checkpoint") == 2
    assert re.search(message, the_line(capsys.readouterr().err))
    assert [child.name for child in tmp_path.iterdir()] == ["hf"]


def with_experts(checkpoint: Path) -> None:
    """The size of the cut is checked before any tensor is looked at."""
    experts = {"count": 4, "per_token": 2, "ffn_hidden_size": 96, "normalized": True}
    edit_json(checkpoint / "model.json", lambda values: values.update(experts=experts))


CUTS: dict[str, tuple[Damage, dict[str, int], str]] = {
    "heads": (lambda checkpoint: None, {"tensor": 3}, r"parallel.tensor: 3 does not divide the model's 4 attention"),
    "kv heads": (lambda checkpoint: None, {"tensor": 4}, r"tensor: 4 does not divide the model's 2 key/value heads"),
    "layers": (lambda checkpoint: None, {"pipeline": 4}, r"pipeline: 4 does not divide the model's 2 layers; .* of 2"),
    "no experts": (lambda checkpoint: None, {"expert": 2}, r"parallel.expert: 2, but the model \(llama\) has no exper"),
    "experts": (with_experts, {"expert": 3}, r"parallel.expert: 3 does not divide the model's 4 experts; .* of 4"),
    "processes": (
        lambda checkpoint: None,
        {"tensor": 2, "pipeline": 2},
        r"tensor 2, pipeline 2, expert 1: .* 4 parts, which is no divisor of 1, .*torchrun --nproc-per-node 4",
    ),
}


@pytest.mark.parametrize("kind", CUTS)
def test_topology_that_does_not_fit_the_model(
    checkpoint: Path, hf: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    damage, cut, message = CUTS[kind]
    damage(checkpoint)
    capsys.readouterr()
    assert run(verify_conversion.main, hf=hf, checkpoint=checkpoint, **cut) == 2
    captured = capsys.readouterr()
    assert re.search(message, the_line(captured.err))
    assert not captured.out


@pytest.fixture
def checkpoint(tmp_path: Path, hf: Path) -> Path:
    assert run(convert_hf_to_megatron.main, hf=hf, output=tmp_path / "converted") == 0
    return tmp_path / "converted"


def test_output_that_is_not_empty(
    tmp_path: Path, hf: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(checkpoint) | content(hf)
    capsys.readouterr()
    assert run(convert_hf_to_megatron.main, hf=hf, output=checkpoint) == 2
    line = the_line(capsys.readouterr().err)
    assert f"{checkpoint}: already holds a complete output (manifest.json); expected an output directory" in line
    assert run(convert_megatron_to_hf.main, checkpoint=checkpoint, output=hf) == 2
    assert f"{hf}: already holds a complete output (config.json); expected" in the_line(capsys.readouterr().err)
    (hf / "config.json").rename(hf / "notes.json")
    assert run(convert_megatron_to_hf.main, checkpoint=checkpoint, output=hf) == 2
    assert f"{hf}: is not empty (generation_config.json, " in the_line(capsys.readouterr().err)
    (hf / "notes.json").rename(hf / "config.json")
    assert content(checkpoint) | content(hf) == before
    assert {child.name for child in tmp_path.iterdir()} == {"hf", "converted"}


def content(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize("tool", [convert_hf_to_megatron, convert_megatron_to_hf], ids=["import", "export"])
def test_too_little_space(
    tmp_path: Path,
    hf: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tool: ModuleType,
) -> None:
    source = {"hf": hf} if tool is convert_hf_to_megatron else {"checkpoint": checkpoint}
    capsys.readouterr()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1234, 1234))
    assert run(tool.main, **source, output=tmp_path / "out") == 2
    needed = r"out: needs \d+,\d{3}(,\d{3})? bytes but 1,234 are free on its file system; expected enough room"
    assert re.search(needed, the_line(capsys.readouterr().err))
    assert {child.name for child in tmp_path.iterdir()} == {"hf", "converted"}


@pytest.mark.parametrize("tool", [convert_hf_to_megatron, convert_megatron_to_hf], ids=["import", "export"])
def test_disk_fills_up_while_writing(tmp_path: Path, hf: Path, checkpoint: Path, tool: ModuleType) -> None:
    """A program of its own whose files may not grow beyond 100 KB."""
    source = ["--hf", hf] if tool is convert_hf_to_megatron else ["--checkpoint", checkpoint]
    program = [sys.executable, tool.__file__, *source, "--output", tmp_path / "out"]
    ended = subprocess.run(
        ["bash", "-c", f"ulimit -f 100; exec {shlex.join(map(str, program))}"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 2, ended
    written = r"could not be written: File too large, [\d,]+ bytes are free; expected room for [\d,]+ bytes; fix: free"
    assert re.search(written, the_line(ended.stderr))
    assert {child.name for child in tmp_path.iterdir()} == {"hf", "converted"}


def test_export_of_what_is_no_checkpoint(tmp_path: Path, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(convert_megatron_to_hf.main, checkpoint=hf, output=tmp_path / "out") == 2
    assert "is an HF checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_interrupted_conversion_starts_clean(tmp_path: Path, hf: Path) -> None:
    leftover = tmp_path / "tmp-checkpoint"
    (leftover / "weights").mkdir(parents=True)
    (leftover / ".exo-staging").touch()
    (leftover / "weights" / "__0_0.distcp").write_bytes(b"half")
    assert run(convert_hf_to_megatron.main, hf=hf, output=tmp_path / "checkpoint") == 0
    assert not leftover.exists()


@pytest.mark.parametrize("tool", [convert_hf_to_megatron, convert_megatron_to_hf])
def test_a_directory_of_the_user_with_the_name_of_staging(
    tmp_path: Path, hf: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], tool: ModuleType
) -> None:
    notes = tmp_path / "tmp-base" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    source = {"hf": hf} if tool is convert_hf_to_megatron else {"checkpoint": checkpoint}
    capsys.readouterr()
    assert run(tool.main, **source, output=tmp_path / "base") == 2
    assert "tmp-base: holds what no run of ours has made (notes.txt)" in the_line(capsys.readouterr().err)
    assert notes.read_text() == "mine"
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("tool", [convert_hf_to_megatron, convert_megatron_to_hf])
@pytest.mark.parametrize("failure", [RuntimeError("no"), TopologyError("a", "b", expected="c", fix="d")])
def test_verification_that_breaks_leaves_nothing(
    tmp_path: Path,
    hf: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tool: ModuleType,
    failure: Exception,
) -> None:
    seen: set[str] = set()

    def fail(wanted: VerifyConfig, runtime: object) -> None:
        made = wanted.checkpoint if tool is convert_hf_to_megatron else wanted.hf
        seen.update(child.name for child in made.iterdir())
        assert (made / STAGING_MARKER).is_file()
        raise failure

    monkeypatch.setattr(verifying, "run_checks", fail)
    (tmp_path / "in").mkdir()
    source = {"hf": hf} if tool is convert_hf_to_megatron else {"checkpoint": checkpoint}
    program = partial(run, lambda words: tool.main([*words, "--verify"]))
    assert program(**source, output=tmp_path / "in" / "base") == (2 if isinstance(failure, TopologyError) else 1)
    assert STAGING_MARKER in seen
    assert not seen & STAGE_FILES
    assert ("config.json" in seen) == (tool is convert_megatron_to_hf), "only an HF directory has one, to be verified"
    assert not list((tmp_path / "in").iterdir())
    monkeypatch.undo()
    assert program(**source, output=tmp_path / "in" / "base") == 0
    assert [child.name for child in (tmp_path / "in").iterdir()] == ["base"]
    assert not (tmp_path / "in" / "base" / STAGING_MARKER).exists()


def test_a_cut_that_cannot_be_checked_is_passed_over(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    def check(spec: object, cut: ParallelConfig) -> None:
        if cut.tensor > 1:
            raise CheckpointError("a", "b", expected="c", fix="d")

    monkeypatch.setattr(verifying, "check_topology", check)
    assert verifying._fitting_cut(read_spec(checkpoint), 2) == ParallelConfig(pipeline=2)
