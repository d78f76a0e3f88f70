"""The wheel, away from the checkout: its licence, and that what its messages tell the user to do can be done."""

from __future__ import annotations

import ast
import email.parser
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from exo_megatron.cli.help import COMMANDS

ROOT = Path(__file__).parents[3]
NOT_IN_THE_WHEEL = re.compile(r"\b(tools|tests|docs|examples|slurm)/\w")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the contents of the wheel alone."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    source.mkdir()
    for name in ("exo_megatron", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(root), str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = root.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(root / "site")
    return root / "site"


def run(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "exo_megatron", *words]
    return subprocess.run(
        command, cwd=site.parent, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_licence_is_named_and_included(site: Path) -> None:
    (info,) = site.glob("exo_megatron-*.dist-info")
    metadata = email.parser.Parser().parsestr((info / "METADATA").read_text(encoding="utf-8"))
    assert "Apache-2.0" in (metadata["License-Expression"] or metadata["License"])
    (licence,) = info.rglob("LICENSE")
    assert licence.read_text(encoding="utf-8") == (ROOT / "LICENSE").read_text(encoding="utf-8")


def messages(path: Path) -> Iterator[str]:
    """The strings of a module that are no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.value


def test_messages_name_nothing_that_is_not_in_the_wheel(site: Path) -> None:
    texts = [text for path in site.rglob("*.py") for text in messages(path)]
    assert len(texts) > 1000
    assert [text for text in texts if NOT_IN_THE_WHEEL.search(text)] == []
    named = {word for text in texts for word in re.findall(r"exo-megatron ([a-z]+)\b", text)}
    assert "import" in named
    assert named <= set(COMMANDS)
    (info,) = site.glob("exo_megatron-*.dist-info")
    extras = set(re.findall(r"^Provides-Extra: (.*)$", (info / "METADATA").read_text(), re.MULTILINE))
    assert {extra for text in texts for extra in re.findall(r"exo-megatron\[(\w+)\]", text)} <= extras


def test_the_command_of_a_message_can_be_run(site: Path) -> None:
    """Pickled weights are refused with a command; that command, and the import after it, work from the wheel."""
    folder = site.parent / "pickled"
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    folder.mkdir()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    refused = run(site, "import", f"hf={folder}", f"output={site.parent / 'checkpoint'}")
    assert refused.returncode == 2
    command = shlex.split(refused.stderr.partition("with nothing in it run: ")[2])
    assert command[:2] == ["exo-megatron", "pickles"]
    made = run(site, *command[1:])
    assert made.returncode == 0, made.stderr
    (output,) = [word.removeprefix("output=") for word in command if word.startswith("output=")]
    imported = run(site, "import", f"hf={output}", f"output={site.parent / 'checkpoint'}")
    assert imported.returncode == 0, imported.stderr
    verified = run(site, "verify", f"hf={output}", f"checkpoint={site.parent / 'checkpoint'}")
    assert verified.returncode == 0, verified.stderr
