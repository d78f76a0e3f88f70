"""Converted checkpoints against Hugging Face: logits at every position, log-probs, and the way back to HF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.multiprocess.align_case import reward_groups
from tests.multiprocess.harness import Check, Outcome, run_checks
from tests.multiprocess.logits_checks import TEMPERATURE
from tests.reference.tiny_llama import save_hf, tiny_config, tiny_llama

TOLERANCE = 1e-4
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Variant:
    """A kind of Llama. The vocabulary is padded to 128 rows, so that of 90 leaves the last of four shards empty."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    rope_scaling: dict[str, Any] | None = None
    rope_base: float = 10000.0
    dtype: torch.dtype = torch.float32

    def model(self) -> LlamaForCausalLM:
        config = tiny_config(rope_scaling=self.rope_scaling, **self.settings)
        config.rope_parameters["rope_theta"] = self.rope_base
        return tiny_llama(config, seed=21, dtype=self.dtype)


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("grouped"),
        Variant("tied-llama3", {"tied": True, "head_dim": 32}, rope_scaling=LLAMA3, rope_base=500000.0),
        Variant(
            "all-heads-linear", {"num_key_value_heads": 4, "vocab_size": 90}, {"rope_type": "linear", "factor": 2.0}
        ),
        Variant("one-kv-head", {"num_key_value_heads": 1}),
        Variant("bf16", dtype=torch.bfloat16),
    )
}


@dataclass(frozen=True)
class Place:
    """A variant at a topology."""

    variant: str
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = True

    @property
    def name(self) -> str:
        return f"{self.variant}_tp{self.tensor}pp{self.pipeline}{'' if self.sequence else '_nosp'}"


PLACES = {
    1: [Place(name) for name in VARIANTS],
    2: [
        *(Place(name, tensor=2) for name in VARIANTS if name != "one-kv-head"),
        *(Place(name, pipeline=2) for name in VARIANTS),
        Place("grouped", tensor=2, sequence=False),
    ],
    4: [
        Place("all-heads-linear", tensor=4),
        Place("grouped", tensor=2, pipeline=2),
        Place("tied-llama3", tensor=2, pipeline=2),
        Place("one-kv-head", pipeline=4),
    ],
}
ALL_PLACES = [place for places in PLACES.values() for place in places]

# A prompt of one token and a long answer covers every position of a row; the others are ragged groups.
LONG = (3, *range(4, 90), 2)


def groups() -> tuple[list[Sequence[int]], list[Sequence[Sequence[int]]]]:
    """Ids below 90: every variant has them."""
    ragged = [group for group in reward_groups(seed=5) if len(group.candidates) > 2][:3]
    prompts: list[Sequence[int]] = [LONG[:1], *([i % 90 for i in group.prompt] for group in ragged)]
    candidates: list[Sequence[Sequence[int]]] = [[LONG[1:]]]
    candidates += [[[i % 90 for i in y] for y in group.candidates] for group in ragged]
    return prompts, candidates


def hf_logits(model: LlamaForCausalLM) -> tuple[Tensor, Tensor]:
    """[N, V] logits that predict each response token, from a row of its own for every candidate; [N] the tokens."""
    logits, tokens = [], []
    for prompt, candidates in zip(*groups(), strict=True):
        for candidate in candidates:
            with torch.no_grad():
                whole = model(input_ids=torch.tensor([[*prompt, *candidate]]), use_cache=False).logits[0]
            logits.append(whole[len(prompt) - 1 : -1])
            tokens.extend(candidate)
    return torch.cat(logits), torch.tensor(tokens)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("logits")
    for name, variant in VARIANTS.items():
        save_hf(variant.model(), directory / f"hf-{name}")
    return directory


@pytest.fixture(scope="module")
def outcomes(root: Path) -> dict[str, Outcome]:
    """Import with one process, logits at every place, export with two."""
    prompts, candidates = groups()
    result: dict[str, Outcome] = {}
    for size, places in PLACES.items():
        checks = []
        if size == 1:
            for name in VARIANTS:
                arguments = {"hf": root / f"hf-{name}", "output": root / name}
                checks.append(Check(f"import-{name}", "tests.multiprocess.align_checks:import_checkpoint", arguments))
        for place in places:
            arguments = {
                "checkpoint": root / place.variant,
                "tensor": place.tensor,
                "pipeline": place.pipeline,
                "sequence": place.sequence,
                "prompts": prompts,
                "candidates": candidates,
            }
            checks.append(Check(place.name, "tests.multiprocess.logits_checks:logits_of_groups", arguments))
        if size == 2:
            for name in VARIANTS:
                arguments = {"checkpoint": root / name, "output": root / f"exported-{name}"}
                checks.append(Check(f"export-{name}", "tests.multiprocess.align_checks:export_checkpoint", arguments))
        result |= run_checks(size, checks, root / "workers")
    return result


def place_name(place: Place) -> str:
    return place.name


@pytest.mark.parametrize("place", ALL_PLACES, ids=place_name)
def test_logits_and_logprobs(place: Place, outcomes: dict[str, Outcome]) -> None:
    """Models are computed in fp32, also that of a bf16 checkpoint (whose weights fp32 holds exactly)."""
    parts = [part for part in outcomes[place.name].values() if part is not None]
    parts.sort(key=lambda part: part.tensor_rank)
    model = VARIANTS[place.variant].model().float()
    expected, tokens = hf_logits(model)
    logits = torch.cat([part.logits for part in parts], dim=-1)
    assert logits.shape[-1] == 128
    assert (logits[:, : model.config.vocab_size] - expected).abs().max().item() < TOLERANCE
    logprobs = torch.log_softmax(expected / TEMPERATURE, dim=-1).gather(-1, tokens[:, None])[:, 0]
    for part in parts:
        assert (part.logprobs - logprobs).abs().max().item() < TOLERANCE


def test_logits_are_worth_comparing() -> None:
    """They differ between positions and between variants by far more than the tolerance."""
    logits = {name: hf_logits(variant.model().float())[0] for name, variant in VARIANTS.items()}
    for name, values in logits.items():
        assert values.std().item() > 0.5 and values.std(dim=0).mean().item() > 0.5, name
    changed = Variant("grouped", rope_base=11000.0).model()
    assert (hf_logits(changed)[0] - logits["grouped"]).abs().max().item() > 100 * TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_there_and_back_bit_for_bit(name: str, root: Path, outcomes: dict[str, Outcome]) -> None:
    outcomes[f"import-{name}"].values()
    outcomes[f"export-{name}"].values()
    before = load_file(root / f"hf-{name}" / "model.safetensors")
    after = {
        key: tensor
        for file in (root / f"exported-{name}").glob("*.safetensors")
        for key, tensor in load_file(file).items()
    }
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype and torch.equal(after[key], tensor), key


@pytest.mark.parametrize("name", VARIANTS)
def test_export_loads_with_transformers(name: str, root: Path, outcomes: dict[str, Outcome]) -> None:
    """Through AutoModelForCausalLM: the same logits, so config and weights belong together."""
    outcomes[f"export-{name}"].values()
    loaded = AutoModelForCausalLM.from_pretrained(
        root / f"exported-{name}", attn_implementation="eager", dtype="auto", trust_remote_code=False
    )
    original = VARIANTS[name].model()
    assert loaded.dtype == original.dtype
    assert torch.equal(hf_logits(loaded)[0], hf_logits(original)[0])
