"""Tiny random HF Llama checkpoints of several kinds, and conversions of them in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from exo_megatron.config.sections import ModelConfig
from exo_megatron.config.stages import ExportConfig, ImportConfig
from exo_megatron.parallel.runtime import Runtime, distributed_runtime
from exo_megatron.stages.export_hf import run_export
from exo_megatron.stages.import_hf import run_import
from tests.reference.tiny_llama import save_hf, tiny_config, tiny_llama

Imports = Callable[..., Path]


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with distributed_runtime() as runtime:
        yield runtime


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """An untied fp32 model with 2 of 4 heads for keys and values and 101 tokens."""
    return make_hf(tmp_path / "hf")


def make_hf(directory: Path, *, dtype: torch.dtype = torch.float32, shard: str | None = None, **config: Any) -> Path:
    """Write a model of 2 layers. shard: largest safetensors file, as in transformers."""
    model = tiny_llama(tiny_config(num_hidden_layers=2, **config), seed=3, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    save_hf(model, directory)
    if shard is not None:
        (directory / "model.safetensors").unlink()
        model.save_pretrained(directory, max_shard_size=shard)
    return directory


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture
def convert(runtime: Runtime) -> Imports:
    """convert(hf, output, dtype="keep"): HF -> distributed."""

    def convert(hf: Path, output: Path, dtype: Any = "keep") -> Path:
        run_import(ImportConfig(hf=hf, output=output, dtype=dtype), runtime)
        return output

    return convert


@pytest.fixture
def export(runtime: Runtime) -> Imports:
    """export(checkpoint, output, dtype="keep"): distributed -> HF."""

    def export(checkpoint: Path, output: Path, dtype: Any = "keep") -> Path:
        run_export(ExportConfig(model=ModelConfig(checkpoint=checkpoint), output=output, dtype=dtype), runtime)
        return output

    return export
