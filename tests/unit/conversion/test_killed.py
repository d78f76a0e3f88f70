"""A conversion that is killed at any moment leaves nothing that looks complete, and can simply be run again."""

from __future__ import annotations

import multiprocessing
import os
import time
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from exo_megatron.checkpoint.directory import STAGING_MARKER, read_fingerprint, resolve_checkpoint
from exo_megatron.checkpoint.safety import verify_checkpoint
from exo_megatron.errors import CheckpointError
from tests.unit.conversion.conftest import tensors_of
from tools import convert_hf_to_megatron, convert_megatron_to_hf


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 MB: enough for the writing to be seen from outside."""
    directory = tmp_path_factory.mktemp("killed") / "hf"
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        vocab_size=10_007,
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(hf: Path) -> Path:
    """The same converted without a disturbance."""
    run(convert_hf_to_megatron, hf=hf, output=hf.parent / "whole")
    return hf.parent / "whole"


def start(tool: ModuleType, **arguments: Path) -> ForkServerProcess:
    """A conversion in a process of its own. They are forked from one that has imported everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.convert_hf_to_megatron", "exo_megatron.checkpoint.save"])
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    process = context.Process(target=tool.main, args=(words,))
    process.start()
    return process


def run(tool: ModuleType, **arguments: Path) -> None:
    process = start(tool, **arguments)
    process.join(300)
    assert process.exitcode == 0


def written(directory: Path) -> int:
    """Bytes below a directory that may come and go."""
    try:
        return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    except FileNotFoundError:
        return 0


def kill_after(process: ForkServerProcess, staging: Path, size: int) -> bool:
    """Kill a conversion by SIGKILL when its staging directory has this size; False if it was done before."""
    limit = time.monotonic() + 300
    while written(staging) < size and process.is_alive():
        assert time.monotonic() < limit
    process.kill()
    process.join(60)
    return process.exitcode != 0


FRACTIONS = (0.0001, 0.4, 0.9)


def test_import(tmp_path: Path, hf: Path, checkpoint: Path) -> None:
    output = tmp_path / "out"
    again = partial(start, convert_hf_to_megatron, hf=hf, output=output)
    total = written(checkpoint / "weights")
    killed = [kill_after(again(), tmp_path / "tmp-out", int(total * part)) for part in FRACTIONS]
    assert any(killed)
    if all(killed):
        assert os.listdir(tmp_path) == ["tmp-out"]
        for path in (output, tmp_path / "tmp-out"):
            with pytest.raises(CheckpointError):
                resolve_checkpoint(path)
        run(convert_hf_to_megatron, hf=hf, output=output)
    assert os.listdir(tmp_path) == ["out"]
    verify_checkpoint(output)
    assert read_fingerprint(output) == read_fingerprint(checkpoint)


def test_export(tmp_path: Path, hf: Path, checkpoint: Path) -> None:
    output = tmp_path / "out"
    again = partial(start, convert_megatron_to_hf, checkpoint=checkpoint, output=output)
    total = written(hf)
    killed = [kill_after(again(), tmp_path / "tmp-out", int(total * part)) for part in FRACTIONS]
    assert any(killed)
    if all(killed):
        assert os.listdir(tmp_path) == ["tmp-out"]
        assert (tmp_path / "tmp-out" / STAGING_MARKER).is_file()
        run(convert_megatron_to_hf, checkpoint=checkpoint, output=output)
    assert os.listdir(tmp_path) == ["out"]
    before, after = tensors_of(hf), tensors_of(output)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
