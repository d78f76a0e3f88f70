"""The verification program: its table and exit codes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist

from exo_megatron.cli import verify_logits
from exo_megatron.cli.verification import Check, render
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
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(row[0], row[-1]) for row in rows[2:]] == [("description", "pass"), ("tensors", "pass"), ("logits", "pass")]


def test_too_little_memory(pair, capsys, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    assert run(pair) == 1
    assert " of memory free, about 0.5 GiB are needed" in capsys.readouterr().out
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
