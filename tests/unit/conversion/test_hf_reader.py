"""Tensors are mapped from where the header says they lie, and only those that are used must be weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from exo_megatron.conversion.hf_reader import HfTensors
from exo_megatron.errors import CheckpointError
from tests.unit.conversion.conftest import Imports, make_hf, tensors_of


def test_every_tensor_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.tensor(2.5, dtype=torch.float16),
        "d": torch.empty(0, 4),
        "e": torch.randn(5000, 3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    hf = HfTensors(tmp_path)
    for name, tensor in tensors.items():
        assert hf.read(name).dtype == tensor.dtype
        assert torch.equal(hf.read(name), tensor), name


def test_tensor_at_an_odd_place(tmp_path: Path) -> None:
    """Other writers than safetensors' own need not align tensors."""
    data = torch.randn(4)
    fields = {
        "flag": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": "F32", "shape": [4], "data_offsets": [1, 17]},
    }
    header = json.dumps(fields).encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + b"\1" + data.numpy().tobytes()
    )
    assert torch.equal(HfTensors(tmp_path).read("w"), data)


def test_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    save_file({"w": torch.ones(10_000)}, tmp_path / "model.safetensors")
    hf = HfTensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is truncated or not safetensors"):
        hf.read("w")


@pytest.mark.parametrize("buffer", [torch.ones(3, dtype=torch.uint8), torch.ones(2).bool(), torch.arange(4)])
def test_ignored_buffers_may_have_any_type(tmp_path: Path, convert: Imports, buffer: Tensor) -> None:
    hf = make_hf(tmp_path / "hf")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**tensors_of(hf), name: buffer}, hf / "model.safetensors", {"format": "pt"})
    convert(hf, tmp_path / "checkpoint")
