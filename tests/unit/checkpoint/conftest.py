"""A process group of one, a checkpoint with a few tensors in it, and a saver of such checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from exo_megatron.checkpoint.save import save_checkpoint
from exo_megatron.models.spec import ModelSpec, Rotary
from exo_megatron.parallel.runtime import Runtime, distributed_runtime

SPEC = ModelSpec(
    family="llama",
    layers=2,
    hidden_size=8,
    ffn_hidden_size=12,
    heads=2,
    kv_heads=1,
    head_dim=4,
    vocab_size=5,
    max_positions=16,
    norm_epsilon=1e-5,
    rotary=Rotary(base=1e4, dim=4),
)

Saver = Callable[..., Path]


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with distributed_runtime() as runtime:
        yield runtime


@pytest.fixture
def hf_files(tmp_path: Path) -> Path:
    directory = tmp_path / "hf-source"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "model.safetensors").write_bytes(b"weights stay where they are")
    (directory / "model.safetensors.index.json").write_text("{}")
    (directory / "modeling_custom.py").write_text("raise SystemExit")
    return directory


def sharded(value: float = 1.0) -> dict[str, Any]:
    """A state of two stacked layers, a tensor of its own, an object, and plain values."""
    layers = torch.arange(12, dtype=torch.float32).reshape(2, 6) * value
    state: dict[str, Any] = {
        f"layer{i}": ShardedTensor.from_rank_offsets("layers.weight", layers[i], (0, i, 2), prepend_axis_num=1)
        for i in range(2)
    }
    state["embedding"] = ShardedTensor.from_rank_offsets("embedding", torch.full((4, 3), value, dtype=torch.bfloat16))
    state["optimizer"] = {
        "steps": ShardedObject("optimizer.steps", {"count": 7, "scale": value}, (1,), (0,)),
        "groups": [{"lr": 0.5, "betas": [0.9, 0.95]}],
    }
    state["linear._extra_state"] = ShardedObject("linear._extra_state", None, (1,), (0,))
    return state


@pytest.fixture
def save(runtime: Runtime, hf_files: Path) -> Saver:
    """save(target, value=1.0, step=None): a checkpoint of kind "training" if it has a step."""

    def saver(target: Path, *, value: float = 1.0, step: int | None = None) -> Path:
        save_checkpoint(
            target,
            sharded(value),
            spec=SPEC,
            hf_files=hf_files,
            step=step,
            kind="model" if step is None else "training",
            trainer_state=None if step is None else {"step": step},
            runtime=runtime,
        )
        return target

    return saver
