"""The tables name exactly the tensors that transformers writes, and lose nothing of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exo_megatron.conversion.families import FAMILIES, find_family
from exo_megatron.conversion.hf_reader import HfTensors, check_tensors
from exo_megatron.conversion.rules import Entry, Family, Shape
from exo_megatron.errors import CheckpointError
from exo_megatron.models.spec import ModelSpec
from tests.reference.chatglm2 import save_chatglm2, tiny_chatglm2
from tests.reference.tiny_models import LANGUAGE_MODELS, Tiny
from tests.unit.conversion.conftest import tensors_of

MODELS: dict[str, Tiny] = {
    name: LANGUAGE_MODELS[name]
    for name in sorted(
        (FAMILIES.keys() - {"chatglm"}) | {"gpt2-untied", "gpt_neox-sequential-tied", "llama-yarn-biases", "qwen3-tied"}
    )
}
MODELS |= {
    f"{family}, classifier": LANGUAGE_MODELS[family].classifier(1 + number % 3)
    for number, family in enumerate(sorted(FAMILIES.keys() - {"chatglm"}))
}


@pytest.fixture(scope="module", params=[*MODELS, "chatglm"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("saved") / "hf"
    if request.param == "chatglm":
        save_chatglm2(tiny_chatglm2(seed=1, dtype=torch.float32), directory)
    else:
        MODELS[request.param].model().save_pretrained(directory)
    return directory


def description(directory: Path) -> tuple[Family, ModelSpec]:
    values = json.loads((directory / "config.json").read_text())
    family = find_family(values, str(directory))
    return family, family.read_config(values, str(directory))


def entries_of(directory: Path) -> list[Entry]:
    family, spec = description(directory)
    return [entry for rule in family.tensors(spec) for entry in rule.entries()]


def test_names_and_shapes(saved: Path) -> None:
    family, _ = description(saved)
    written: dict[str, Shape] = {
        name: tuple(tensor.shape)
        for name, tensor in tensors_of(saved).items()
        if not any(pattern.fullmatch(name) for pattern in family.ignored)
    }
    named = [source for entry in entries_of(saved) for source in entry.sources.items()]
    assert dict(named) == written
    assert len(named) == len(written)


def test_every_element_has_one_place(saved: Path) -> None:
    """Of whole numbers, each tensor of ours holds all of its sources and zeros, and is taken apart into them again."""
    keys = set()
    for entry in entries_of(saved):
        parts, first = [], 1
        for shape in entry.sources.values():
            size = torch.Size(shape).numel()
            parts.append(torch.arange(first, first + size).reshape(shape))
            first += size
        whole = entry.rule.transform.join(parts)
        assert whole.shape == entry.rule.shape
        assert torch.equal(whole.flatten().sort().values[-(first - 1) :], torch.arange(1, first))
        assert whole.count_nonzero() == first - 1
        again = entry.rule.transform.split(whole)
        assert all(torch.equal(one, other) for one, other in zip(parts, again, strict=True))
        keys.add((entry.rule.key, entry.index))
    assert len(keys) == len(entries_of(saved))


def save_tensors(
    name: str, directory: Path, *, bare: bool = False, extra: dict[str, Tensor] | None = None
) -> HfTensors:
    """A tiny model, with its names without their prefix (bare), and with more tensors beside its own."""
    MODELS[name].model().save_pretrained(directory)
    family, _ = description(directory)
    path = directory / "model.safetensors"
    tensors = load_file(path) | (extra or {})
    renamed = {key.removeprefix(family.base_prefix) if bare else key: tensor for key, tensor in tensors.items()}
    save_file(renamed, path, {"format": "pt"})
    return HfTensors(directory, family)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gpt2, classifier"])
def test_names_without_the_prefix(tmp_path: Path, name: str) -> None:
    whole, hf = save_tensors(name, tmp_path / "whole"), save_tensors(name, tmp_path / "bare", bare=True)
    family, spec = description(tmp_path / "bare")
    check_tensors(hf, entries_of(tmp_path / "bare"), family, tied=spec.tied_embeddings)
    assert hf.tensors.keys() == whole.tensors.keys()
    for tensor in whole.tensors:
        assert torch.equal(hf.read(tensor), whole.read(tensor))


MASK = torch.ones(1, 1, 8, 8, dtype=torch.bool)
BUFFERS: dict[str, dict[str, Tensor]] = {
    "gpt2": {"transformer.h.0.attn.bias": MASK, "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)},
    "gpt_neox": {
        "gpt_neox.layers.0.attention.bias": MASK.byte(),
        "gpt_neox.layers.1.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.ones(2),
    },
    "mistral": {"model.layers.3.self_attn.rotary_emb.inv_freq": torch.ones(8)},
}


@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.parametrize("bare", [False, True])
def test_buffers_of_older_files(tmp_path: Path, name: str, bare: bool) -> None:
    hf = save_tensors(name, tmp_path, bare=bare, extra=BUFFERS[name])
    family, spec = description(tmp_path)
    check_tensors(hf, entries_of(tmp_path), family, tied=spec.tied_embeddings)


def test_a_head_that_the_architecture_has_not(tmp_path: Path) -> None:
    hf = save_tensors("llama", tmp_path, extra={"score.weight": torch.ones(1, 64)})
    family, spec = description(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds score\.weight \[1, 64\], which this llama model has not"):
        check_tensors(hf, entries_of(tmp_path), family, tied=spec.tied_embeddings)
