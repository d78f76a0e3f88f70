"""What the ranks of test_verify.py do: plant errors in checkpoints, and verify."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exo_megatron.checkpoint.directory import read_spec, tokenizer_path, weights_path
from exo_megatron.checkpoint.dist_format import PlannedShard, planned_state
from exo_megatron.checkpoint.save import save_checkpoint
from exo_megatron.checkpoint.tensors import StoredTensors
from exo_megatron.config.sections import ModelConfig, ParallelConfig
from exo_megatron.config.stages import ExportConfig, ImportConfig, VerifyConfig
from exo_megatron.conversion import families
from exo_megatron.conversion.importing import ImportPlan
from exo_megatron.conversion.transforms import Transform
from exo_megatron.conversion.verifying import Direction
from exo_megatron.errors import ExoError
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.stages.export_hf import run_export
from exo_megatron.stages.import_hf import run_import
from exo_megatron.stages.verification import Check
from exo_megatron.stages.verify import run_checks

QKV = "decoder.layers.self_attention.linear_qkv.weight"
EMBEDDING = "embedding.word_embeddings.weight"
WRONG_BASE = 20000.0


@dataclass(frozen=True)
class Finding:
    """What a verification said: its rows by name, or the error that ended it."""

    rows: dict[str, Check]
    error: str = ""


def convert(runtime: Runtime, *, hf: Path, checkpoint: Path, exported: Path, dtypes: tuple[Any, Any]) -> None:
    """There with the first type, and back with the second."""
    run_import(ImportConfig(hf=hf, output=checkpoint, dtype=dtypes[0]), runtime)
    run_export(ExportConfig(model=ModelConfig(checkpoint=checkpoint), output=exported, dtype=dtypes[1]), runtime)


def find(
    runtime: Runtime,
    *,
    hf: Path,
    checkpoint: Path,
    tensor: int = 1,
    pipeline: int = 1,
    prompts: Path | None = None,
    made: Direction | None = None,
) -> Finding:
    """Verify without the exit code."""
    cut = ParallelConfig(tensor=tensor, pipeline=pipeline)
    try:
        config = VerifyConfig(hf=hf, checkpoint=checkpoint, parallel=cut, prompts=prompts, made=made)
        checks = run_checks(config, runtime)
    except ExoError as error:
        return Finding({}, str(error))
    return Finding({check.name: check for check in checks})


def swap_query_and_key(spec: ModelSpec, tensors: dict[str, Tensor]) -> None:
    """The first query head of the second layer changes places with its key head."""
    d, per_group = spec.head_dim, spec.heads // spec.kv_heads * spec.head_dim
    rows = tensors[QKV][1]
    rows[:d], rows[per_group : per_group + d] = rows[per_group : per_group + d].clone(), rows[:d].clone()


def drop_tensor(spec: ModelSpec, tensors: dict[str, Tensor]) -> None:
    del tensors["decoder.final_layernorm.weight"]


def flip_bit(spec: ModelSpec, tensors: dict[str, Tensor]) -> None:
    """The lowest bit of one element."""
    tensors[EMBEDDING].view(torch.int32)[7, 5] ^= 1


def rope_base(spec: ModelSpec, tensors: dict[str, Tensor]) -> None:
    """Nothing in the tensors; see `plant`."""


PLANTS: dict[str, Callable[[ModelSpec, dict[str, Tensor]], None]] = {
    "swapped q/k block": swap_query_and_key,
    "missing tensor": drop_tensor,
    "flipped bit": flip_bit,
    "wrong rope base": rope_base,
}


def plant(runtime: Runtime, *, source: Path, target: Path, kind: str) -> None:
    """Save a checkpoint again with an error in it and with a manifest that fits. One process."""
    spec, stored = read_spec(source), StoredTensors(weights_path(source))
    tensors = {key: stored.read(key) for key in stored.keys()}  # noqa: SIM118 - not a dict
    PLANTS[kind](spec, tensors)
    files = tokenizer_path(source)
    if kind == "wrong rope base":
        assert spec.rotary is not None
        spec = spec.model_copy(update={"rotary": spec.rotary.model_copy(update={"base": WRONG_BASE})})
        files = target.parent / f"{target.name}-files"
        files.mkdir()
        values = json.loads((tokenizer_path(source) / "config.json").read_text())
        values["rope_parameters"]["rope_theta"] = WRONG_BASE
        (files / "config.json").write_text(json.dumps(values))
    save_checkpoint(
        target,
        planned_state(PlannedShard(key, (), (), tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()),
        spec=spec,
        hf_files=files,
        step=None,
        kind="model",
        trainer_state=None,
        runtime=runtime,
        produce=lambda key, offset: tensors[key],
    )


def edit_tensors(hf: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = hf / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def swap_in_hf(hf: Path) -> None:
    """The first query head of the second layer changes places with its key head."""

    def swap(tensors: dict[str, Tensor]) -> None:
        query, key = (tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qk")
        query[:16], key[:16] = key[:16].clone(), query[:16].clone()

    edit_tensors(hf, swap)


def flip_in_hf(hf: Path) -> None:
    def flip(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"].view(torch.int32)[7, 5] ^= 1

    edit_tensors(hf, flip)


def rope_base_in_hf(hf: Path) -> None:
    values = json.loads((hf / "config.json").read_text())
    values["rope_parameters"]["rope_theta"] = WRONG_BASE
    (hf / "config.json").write_text(json.dumps(values))


IN_HF: dict[str, Callable[[Path], object]] = {
    "swapped q/k block": swap_in_hf,
    "missing tensor": lambda hf: edit_tensors(hf, lambda tensors: tensors.pop("model.norm.weight")),
    "flipped bit": flip_in_hf,
    "wrong rope base": rope_base_in_hf,
}


def damage(runtime: Runtime, *, source: Path, target: Path, kind: str) -> None:
    """Copy an HF checkpoint and put an error into it."""
    IN_HF[kind](shutil.copytree(source, target))


def change_on_disk(runtime: Runtime, *, source: Path, target: Path) -> None:
    """Copy a checkpoint and flip a bit of its weights; the manifest stays."""
    (weights,) = (shutil.copytree(source, target) / "weights").glob("*.distcp")
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)


def broken_import(runtime: Runtime, *, hf: Path, output: Path) -> str:
    """An import that puts one bit wrong, with `verify`: what it says."""
    produce = ImportPlan.produce

    def broken(plan: ImportPlan, key: str, offset: tuple[int, ...]) -> Tensor:
        tensor = produce(plan, key, offset).clone()
        if key == EMBEDDING:
            tensor.view(torch.int32)[3, 3] ^= 1
        return tensor

    ImportPlan.produce = broken  # type: ignore[method-assign]
    try:
        return _words(lambda: run_import(ImportConfig(hf=hf, output=output, verify=True), runtime))
    finally:
        ImportPlan.produce = produce  # type: ignore[method-assign]


def broken_export(runtime: Runtime, *, checkpoint: Path, output: Path) -> str:
    """An export of a checkpoint whose rule for the embedding takes it apart wrongly, with `verify`: what it says."""
    family = families.FAMILIES["llama"]
    calls = 0

    def split(whole: Tensor) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        return (whole[:101].flip(0),) if calls == 1 else (whole[:101],)

    def tensors(spec: ModelSpec) -> tuple[Any, ...]:
        return tuple(
            replace(rule, transform=Transform(rule.transform.join, split)) if rule.key == EMBEDDING else rule
            for rule in family.tensors(spec)
        )

    families.FAMILIES["llama"] = replace(family, tensors=tensors)
    config = ExportConfig(model=ModelConfig(checkpoint=checkpoint), output=output, verify=True)
    try:
        return _words(lambda: run_export(config, runtime))
    finally:
        families.FAMILIES["llama"] = family


def misread(runtime: Runtime, *, hf: Path, output: Path) -> Finding:
    """A family that reads a wrong rope base whenever it reads: nothing but the logits can show it."""
    family = families.FAMILIES["llama"]

    def read_config(values: Any, where: str) -> ModelSpec:
        return family.read_config(values | {"rope_parameters": {"rope_theta": WRONG_BASE}}, where)

    families.FAMILIES["llama"] = replace(family, read_config=read_config)
    try:
        run_import(ImportConfig(hf=hf, output=output), runtime)
        return find(runtime, hf=hf, checkpoint=output)
    finally:
        families.FAMILIES["llama"] = family


def _words(work: Callable[[], None]) -> str:
    try:
        work()
    except ExoError as error:
        return f"{type(error).__name__} {error.exit_code}: {error}"
    return "no error"
