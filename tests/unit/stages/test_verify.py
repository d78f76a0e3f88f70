"""The verification program: its table and exit codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch.distributed as dist
import transformers

from exo_megatron.conversion import families
from exo_megatron.evaluation.logits import built_in_examples, windows_not_exceeded
from exo_megatron.models.spec import ModelSpec
from exo_megatron.stages import verify_logits
from exo_megatron.stages.verification import Check, render
from tests.reference.tiny_models import LANGUAGE_MODELS
from tests.unit.checkpoint.conftest import SPEC
from tests.unit.conversion.conftest import make_hf
from tools import convert_hf_to_megatron, verify_conversion


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name an HF checkpoint and its conversion."""
    root = tmp_path_factory.mktemp("pair")
    hf = make_hf(root / "hf")
    assert convert_hf_to_megatron.main(["--hf", str(hf), "--output", str(root / "checkpoint")]) == 0
    return ["--hf", str(hf), "--checkpoint", str(root / "checkpoint")]


def run(words: list[str]) -> int:
    try:
        return verify_conversion.main(words)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_table():
    details = tuple(f"tensor {number}" for number in range(12))
    text = render([Check("tensors", "21 tensors", "0.5", "FAIL", details), Check("logits", "-", "-", "pass")])
    assert text.splitlines() == [
        "check    compared    largest difference  result",
        "-------  ----------  ------------------  ------",
        "tensors  21 tensors  0.5                 FAIL",
        "logits   -           -                   pass",
        *(f"tensors: tensor {number}" for number in range(10)),
        "tensors: and 2 more",
    ]


def test_all_agrees(pair, capsys):
    assert run(pair) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()][2:]
    assert [(line[0], line[-1]) for line in lines] == [
        ("description", "pass"),
        ("tensors", "pass"),
        ("logits", "pass"),
    ]


def test_too_little_memory(pair, capsys, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    assert run(pair) == 1
    assert " of memory free, about 1.0 GiB are needed" in capsys.readouterr().out
    assert run([*pair, "--tensors-only"]) == 0
    assert "logits" not in capsys.readouterr().out


def test_family_that_hugging_face_cannot_run(pair, capsys, monkeypatch):
    monkeypatch.setattr(verify_logits, "REMOTE_CODE", frozenset({"llama"}))
    assert run(pair) == 0
    out = capsys.readouterr().out
    assert "not comparable" in out
    assert "the code that comes with HF checkpoints is never run" in out


def test_tolerance(pair, capsys):
    assert run([*pair, "--tolerance", "1e-12"]) == 1
    assert "logits: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hf", "nowhere"], "nowhere: does not exist; expected the directory of an HF checkpoint"),
        (["--checkpoint", "nowhere"], "nowhere: does not exist; expected a checkpoint or a stage's output"),
        (["--prompts", "nowhere"], "nowhere: cannot be read"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl: "),
    ],
)
def test_wrong_input(pair, capsys, words, message):
    capsys.readouterr()
    assert run([*pair, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_prompts_that_are_too_long_or_empty(pair, tmp_path: Path, capsys):
    prompts = tmp_path / "prompts.txt"
    for text, message in (("w5 " * 256, "prompts.txt:1: has 256 tokens; expected at most 255"), ("\n", "no prompt")):
        prompts.write_text(text)
        assert run([*pair, "--prompts", str(prompts)]) == 2
        assert message in capsys.readouterr().err


def test_sizes_must_be_positive(pair, capsys):
    with pytest.raises(SystemExit) as ended:
        verify_conversion.main([*pair, "--tensor", "0"])
    assert ended.value.code == 2
    assert "argument --tensor: '0' is not a size; expected a positive whole number" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1e-4", "nan", "inf", "small"])
def test_tolerance_must_be_finite_and_positive(pair, capsys, value):
    with pytest.raises(SystemExit) as ended:
        verify_conversion.main([*pair, f"--tolerance={value}"])
    assert ended.value.code == 2
    assert f"'{value}' is not a tolerance; expected a positive number" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--prompts", "prompts.txt"], ["--tolerance", "1e-4"]])
def test_options_of_the_models_without_the_models(pair, capsys, words):
    with pytest.raises(SystemExit) as ended:
        verify_conversion.main([*pair, "--tensors-only", *words])
    assert ended.value.code == 2
    assert f"argument {words[0]}: not allowed with argument --tensors-only" in capsys.readouterr().err


def test_transformers_that_cannot_load_the_model(pair, capsys, tmp_path: Path, monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise ValueError("model type\n`new` is unknown")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    why = f"logits: transformers {transformers.__version__} cannot load the HF checkpoint (ValueError: model"
    assert run(pair) == 1
    captured = capsys.readouterr()
    assert why in captured.out and "not compared" in captured.out
    assert "exo-megatron: " not in captured.err
    output = tmp_path / "out"
    assert convert_hf_to_megatron.main([*pair[:2], "--output", str(output), "--verify"]) == 0
    assert why in capsys.readouterr().out
    assert (output / "manifest.json").is_file()


def test_windows_are_exceeded_where_published_ones_are_short():
    spec = replace_windows(1024, None, 512)
    batches = built_in_examples(spec)
    (example,) = batches[-1]
    assert example.longest == 1072 and len(example.prompt) > 1024
    assert sum(len(candidate) + 1 for candidate in example.candidates) <= 64
    assert windows_not_exceeded(spec, batches) == []
    spec = replace_windows(4096, None, 4096)
    assert windows_not_exceeded(spec, built_in_examples(spec)) == [4096]
    # What no text of the model can exceed is nothing that was left out.
    spec = replace_windows(None, 8192)
    assert windows_not_exceeded(spec, built_in_examples(spec)) == []


def replace_windows(*windows: int | None) -> ModelSpec:
    return SPEC.model_copy(update={"windows": windows, "max_positions": 8192, "layers": len(windows)})


@pytest.mark.parametrize(("window", "read", "code"), [(1000, 1000, 0), (1000, 960, 1), (1500, 1500, 0)])
def test_a_long_window(tmp_path: Path, capsys, monkeypatch, window: int, read: int, code: int):
    """Also one that the family misreads, which nothing but the logits can show."""
    tiny = LANGUAGE_MODELS["mistral-window"]
    settings = {**tiny.settings, "sliding_window": window, "max_position_embeddings": 2048}
    hf = replace(tiny, settings=settings).save(tmp_path / "hf")
    family = families.FAMILIES["mistral"]

    def read_config(values: Any, where: str) -> ModelSpec:
        return family.read_config(values | {"sliding_window": read}, where)

    monkeypatch.setitem(families.FAMILIES, "mistral", replace(family, read_config=read_config))
    assert convert_hf_to_megatron.main(["--hf", str(hf), "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert run(["--hf", str(hf), "--checkpoint", str(tmp_path / "out")]) == code
    out = capsys.readouterr().out
    assert ("logits: " in out) == (code == 1), out
    assert ("window of 1500 not exceeded" in out) == (read == 1500)
