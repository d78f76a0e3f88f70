"""HF -> distributed checkpoint -> HF gives back every tensor bit for bit, and loads in transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from exo_megatron.checkpoint.directory import (
    list_files,
    make_manifest,
    read_spec,
    record_files,
    weights_path,
    write_manifest,
)
from exo_megatron.checkpoint.dist_format import template_shapes
from exo_megatron.checkpoint.publish import PUBLISHED_FILE
from exo_megatron.checkpoint.safety import verify_checkpoint
from exo_megatron.checkpoint.tensors import StoredTensors
from exo_megatron.config.sections import ComputeConfig, ParallelConfig
from exo_megatron.config.stages import STAGE_FILES, VerifyConfig
from exo_megatron.conversion import hf_writer, meter
from exo_megatron.conversion.verifying import Comparison
from exo_megatron.errors import CheckpointError
from exo_megatron.models.policy import build_policy
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.stages.verification import Check
from exo_megatron.stages.verify import run_checks
from tests.unit.conversion.conftest import Imports, make_hf, tensors_of

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3 rope": {"rope_scaling": LLAMA3},
    "linear rope, all heads": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "num_key_value_heads": 4},
    "one key head, wide heads": {"num_key_value_heads": 1, "head_dim": 24},
    "shards": {"shard": "60KB"},
    "fp16 tied": {"tied": True, "dtype": torch.float16},
    "bf16 shards": {"dtype": torch.bfloat16, "shard": "30KB"},
    "vocabulary without padding": {"vocab_size": 128},
}


@pytest.mark.parametrize("kind", KINDS)
def test_bit_identical(tmp_path: Path, convert: Imports, export: Imports, kind: str) -> None:
    hf = make_hf(tmp_path / "hf", **KINDS[kind])
    checkpoint = convert(hf, tmp_path / "checkpoint")
    verify_checkpoint(checkpoint)
    exported = export(checkpoint, tmp_path / "exported")
    before, after = tensors_of(hf), tensors_of(exported)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    config = json.loads((hf / "config.json").read_text())
    assert json.loads((exported / "config.json").read_text()) == config
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (exported / file).read_bytes() == (hf / file).read_bytes()


@pytest.mark.parametrize("kind", ["untied", "tied", "biases"])
def test_keys_and_shapes_are_those_of_the_model(tmp_path: Path, convert: Imports, runtime: Runtime, kind: str) -> None:
    checkpoint = convert(make_hf(tmp_path / "hf", **KINDS[kind]), tmp_path / "checkpoint")
    stored = StoredTensors(weights_path(checkpoint))
    with model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        model = build_policy(read_spec(checkpoint), topology, ComputeConfig(precision="fp32"))
        wanted = template_shapes(model.sharded_state_dict())
    assert {key: stored.shape(key) for key in stored.keys()} == wanted  # noqa: SIM118 - not a dict


def test_padding_of_the_vocabulary_is_zero(tmp_path: Path, hf: Path, convert: Imports) -> None:
    stored = StoredTensors(weights_path(convert(hf, tmp_path / "checkpoint")))
    original = tensors_of(hf)
    for key, name in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        assert stored.shape(key) == (128, 64)
        assert torch.equal(stored.read(key)[:101], original[name])
        assert not stored.read(key)[101:].any()


@pytest.mark.parametrize(
    ("stored", "asked_import", "asked_export", "result"),
    [
        (torch.float32, "bf16", "keep", torch.bfloat16),
        (torch.bfloat16, "fp32", "keep", torch.float32),
        (torch.float32, "keep", "bf16", torch.bfloat16),
        (torch.float16, "keep", "fp32", torch.float32),
    ],
)
def test_types(
    tmp_path: Path,
    convert: Imports,
    export: Imports,
    stored: torch.dtype,
    asked_import: str,
    asked_export: str,
    result: torch.dtype,
) -> None:
    hf = make_hf(tmp_path / "hf", dtype=stored)
    exported = export(convert(hf, tmp_path / "c", asked_import), tmp_path / "e", asked_export)
    before, after = tensors_of(hf), tensors_of(exported)
    for name, tensor in before.items():
        assert torch.equal(tensor.to(result), after[name]), name
    assert json.loads((exported / "config.json").read_text())["dtype"] == str(result).removeprefix("torch.")


def test_config_of_transformers_4_keeps_its_layout(tmp_path: Path, hf: Path, convert: Imports, export: Imports) -> None:
    config = json.loads((hf / "config.json").read_text())
    del config["dtype"], config["rope_parameters"]
    config |= {"torch_dtype": "float32", "rope_theta": 10000.0, "rope_scaling": None}
    (hf / "config.json").write_text(json.dumps(config))
    exported = export(convert(hf, tmp_path / "c"), tmp_path / "e", "bf16")
    assert json.loads((exported / "config.json").read_text()) == config | {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize("keys", [(), ("dtype",), ("torch_dtype",), ("dtype", "torch_dtype")])
def test_every_key_of_the_type_is_set(keys: tuple[str, ...]) -> None:
    exported = hf_writer.exported_config({"vocab_size": 5, **dict.fromkeys(keys, "float32")}, torch.bfloat16)
    assert exported == {"vocab_size": 5, **dict.fromkeys(keys or ("dtype",), "bfloat16")}


@pytest.mark.parametrize("name", ["/data/sft", "./sft", "~/sft", "runs/sft/hf"])
def test_an_export_names_no_path_of_the_original(name: str) -> None:
    assert "_name_or_path" not in hf_writer.exported_config({"_name_or_path": name}, torch.float32)
    kept = hf_writer.exported_config({"_name_or_path": "meta-llama/Llama-2-7b-hf"}, torch.float32)
    assert kept["_name_or_path"] == "meta-llama/Llama-2-7b-hf"


def test_an_export_holds_only_what_belongs_on_a_hub(tmp_path: Path, hf: Path, convert: Imports) -> None:
    """The stage's own files are beside it, and no file of it names a path of this machine."""
    output = tmp_path / "out"
    words = ["export", f"model.checkpoint={convert(hf, tmp_path / 'c')}", f"output={output}"]

    def run() -> str:
        command = [sys.executable, "-m", "exo_megatron", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout

    run()
    assert {path.name for path in output.iterdir()} == {path.name for path in hf.iterdir()}
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in output.iterdir())
    assert {path.name for path in (tmp_path / ".out.exo-megatron").iterdir()} == STAGE_FILES | {PUBLISHED_FILE}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    done = f"complete already in {output} with this configuration (inputs are not compared)"
    assert run() == f"export: {done}, nothing to do; remove it to run it again\n"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    shutil.rmtree(output)
    run()
    assert tensors_of(output).keys() == tensors_of(hf).keys()


def changed(directory: Path, difference: float) -> None:
    tensors = {name: tensor.clone() for name, tensor in tensors_of(directory).items()}
    tensors["model.norm.weight"][3] += difference
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


Verify = Callable[..., Check]


@pytest.fixture
def verify(runtime: Runtime) -> Verify:
    """verify(hf, checkpoint, made=None): the check of the tensors."""

    def verify(hf: Path, checkpoint: Path, made: Any = None) -> Check:
        return run_checks(VerifyConfig(hf=hf, checkpoint=checkpoint, tensors_only=True, made=made), runtime)[1]

    return verify


def saved_by_training(checkpoint: Path) -> None:
    """Let the manifest say what that of a training stage says."""
    files = record_files(checkpoint, list_files(checkpoint))
    write_manifest(checkpoint, make_manifest(files, step=3, kind="training"))


@pytest.mark.parametrize(("imported", "exported"), [("keep", "bf16"), ("bf16", "fp32"), ("bf16", "keep")])
def test_the_sides_of_a_conversion_agree_and_the_table_says_how(
    tmp_path: Path, hf: Path, convert: Imports, export: Imports, verify: Verify, imported: str, exported: str
) -> None:
    checkpoint = convert(hf, tmp_path / "c", imported)
    out = export(checkpoint, tmp_path / "out", exported)
    rounded = exported == "bf16"
    for directory, made, bf16 in ((hf, None, imported == "bf16"), (out, "export" if rounded else None, rounded)):
        check = verify(directory, checkpoint, made)
        assert check.verdict == "pass"
        assert f"21 tensors ({made or 'import'}" in check.compared
        if directory == hf or rounded:
            assert ("equal after rounding to bfloat16)" in check.compared) == bf16
        changed(directory, 0.5)
        assert verify(directory, checkpoint, made).verdict == "FAIL"


@pytest.mark.parametrize("exported", ["bf16", "keep"])
def test_an_export_of_training_needs_no_option(
    tmp_path: Path, hf: Path, convert: Imports, export: Imports, verify: Verify, exported: str
) -> None:
    checkpoint = convert(hf, tmp_path / "c")
    saved_by_training(checkpoint)
    out = export(checkpoint, tmp_path / "out", exported)
    check = verify(out, checkpoint)
    rounding = ", equal after rounding to bfloat16" if exported == "bf16" else ""
    assert (check.verdict, check.compared) == ("pass", f"21 tensors (export{rounding})")


def test_damage_that_rounding_would_hide_is_found(
    tmp_path: Path, convert: Imports, export: Imports, verify: Verify
) -> None:
    """HF in bf16, the checkpoint in fp32: a damage below the rounding to bf16, which an export would allow."""
    wide = convert(make_hf(tmp_path / "hf", dtype=torch.bfloat16), tmp_path / "c", "fp32")
    assert verify(tmp_path / "hf", wide).compared == "21 tensors (import)"
    changed_hf = export(wide, tmp_path / "fp32", "fp32")
    changed(changed_hf, 1e-4)
    damaged = convert(changed_hf, tmp_path / "damaged")
    check = verify(tmp_path / "hf", damaged)
    assert check.verdict == "FAIL"
    hint, line = check.details
    assert hint == "types differ; fix: made=export if the HF checkpoint was exported from this one"
    assert line.startswith("model.norm.weight[3]: ") and line.endswith("; 1 elements differ")
    # Said to be an export, it is one: nothing but the checkpoint can tell its values.
    assert verify(tmp_path / "hf", damaged, "export").verdict == "pass"


def test_export_loads_in_transformers(tmp_path: Path, hf: Path, convert: Imports, export: Imports) -> None:
    exported = export(convert(hf, tmp_path / "c"), tmp_path / "e")
    ids = torch.tensor([[5, 17, 99]])
    logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (hf, exported)]
    assert torch.equal(logits[0], logits[1])
    model = AutoModelForCausalLM.from_pretrained(exported)
    generated = model.generate(ids, max_new_tokens=4, do_sample=False, generation_config=GenerationConfig())
    assert len(AutoTokenizer.from_pretrained(exported).decode(generated[0]).split()) == 7


def test_export_in_shards(
    tmp_path: Path, hf: Path, convert: Imports, export: Imports, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_writer.plan_shards, "__defaults__", (100_000,))
    exported = export(convert(hf, tmp_path / "c"), tmp_path / "e")
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in exported.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((exported / name).stat().st_size <= 110_000 for name in files)
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(exported / file)[name], tensors_of(hf)[name])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(hf).values())
    assert torch.equal(AutoModelForCausalLM.from_pretrained(exported).lm_head.weight, tensors_of(hf)["lm_head.weight"])


def test_tied_model_that_stores_its_output_layer(tmp_path: Path, convert: Imports, export: Imports) -> None:
    hf = make_hf(tmp_path / "hf", tied=True)
    tensors = tensors_of(hf)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    # Buffers that old versions of transformers saved.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    exported = tensors_of(export(convert(hf, tmp_path / "c"), tmp_path / "e"))
    assert exported.keys() == tensors.keys() - {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}


@pytest.mark.parametrize(("rows", "differ"), [(101, 1), (99, 0)])
def test_verification_of_a_tied_output_layer(tmp_path: Path, convert: Imports, rows: int, differ: int) -> None:
    hf = make_hf(tmp_path / "hf", tied=True)
    stored = StoredTensors(weights_path(convert(hf, tmp_path / "c")))
    save_file(tensors_of(hf) | {"lm_head.weight": torch.zeros(rows, 64)}, hf / "model.safetensors", {"format": "pt"})
    comparison = Comparison(hf, stored.of_model())
    wrong = f"lm_head.weight has shape [{rows}, 64] in the HF checkpoint, and [101, 64] by its config.json"
    assert comparison.problems == ([] if differ else [wrong])
    found = [each.name for entry in comparison.entries for each in comparison.differences(entry, stored.read, "import")]
    assert found == ["lm_head.weight"] * differ


def test_index_of_the_single_file(tmp_path: Path, hf: Path, convert: Imports, export: Imports) -> None:
    index = {"weight_map": dict.fromkeys(tensors_of(hf), "model.safetensors")}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    assert tensors_of(export(convert(hf, tmp_path / "c"), tmp_path / "e")).keys() == tensors_of(hf).keys()


def test_progress_counts_all_bytes(
    tmp_path: Path, hf: Path, convert: Imports, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "_MEGABYTE", 1000)
    convert(hf, tmp_path / "c")
    padded = sum(tensor.nbytes for tensor in tensors_of(hf).values()) + 2 * 27 * 64 * 4
    total = -(-padded // 1000)
    assert f"import: {total}/{total} MB  100%" in capsys.readouterr().err


def flip_bit(checkpoint: Path) -> None:
    path = checkpoint / "weights" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_config(checkpoint: Path) -> None:
    """A checkpoint whose config.json was exchanged before its manifest was written."""
    path = checkpoint / "hf" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = 5.0
    path.write_text(json.dumps(config))
    files = record_files(checkpoint, list_files(checkpoint))
    write_manifest(checkpoint, make_manifest(files, step=None, kind="model"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [(flip_bit, r"__0_0\.distcp: is corrupt"), (other_config, r"config\.json: describes another model")],
)
def test_damaged_checkpoint_is_not_exported(
    tmp_path: Path, hf: Path, convert: Imports, export: Imports, damage: Callable[[Path], None], message: str
) -> None:
    checkpoint = convert(hf, tmp_path / "checkpoint")
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        export(checkpoint, tmp_path / "exported")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["checkpoint", "hf"]
