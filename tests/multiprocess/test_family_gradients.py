"""One EXO step of families whose building blocks Llama has not, against plain PyTorch on HF models.

Loss, gradient norm and every gradient. Norms, biases, position embeddings and norms of query and key heads are whole
on every tensor-parallel rank, which sees a part of their gradient only: it must be summed over the ranks, and counted
once in the norm. Gradients of our tensors are brought under HF's names by the families' own tables, which only move
elements and are proven by the logits of test_families.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from exo_megatron.conversion.families import find_family
from tests.multiprocess.align_case import FEWEST_TOKENS, MAX_TOKENS, objective, reward_groups, write_records
from tests.multiprocess.align_checks import RankRecord
from tests.multiprocess.harness import Check, Outcome, run_checks
from tests.reference.hf_names import whole_tensors
from tests.reference.objective import align_loss
from tests.reference.tiny_llama import save_hf, tiny_tokenizer
from tests.reference.tiny_models import LANGUAGE_MODELS
from tests.reference.weights import perturbed

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "tp2": {"parallel": {"tensor": 2}, "recompute": "selective"},
    "tp2-nosp": {"parallel": {"tensor": 2, "sequence": False}, "recompute": "none"},
    "pp2": {"parallel": {"pipeline": 2}, "recompute": "full"},
    "tp2 in parts": {"parallel": {"tensor": 2}, "recompute": "none", "max_tokens": FEWEST_TOKENS},
    "pp2 in parts": {"parallel": {"pipeline": 2}, "recompute": "full", "max_tokens": FEWEST_TOKENS},
}
MODELS = {
    "gpt2": ("tp2", "tp2-nosp", "pp2", "tp2 in parts"),
    "gpt_neox": ("tp2", "tp2-nosp", "pp2"),
    "qwen2": ("tp2", "tp2-nosp", "pp2"),
    "gemma2": ("tp2", "pp2", "pp2 in parts"),
    "gemma3_text": ("tp2", "tp2-nosp", "pp2"),
    "glm4": ("tp2",),
}
CASES = [(model, topology) for model, topologies in MODELS.items() for topology in topologies]


def models(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Policy, and a reference that differs from it, so that no log-ratio is zero."""
    reference = LANGUAGE_MODELS[name].model(seed=11)
    return perturbed(reference, seed=12, scale=0.1), reference


@dataclass(frozen=True)
class Expected:
    """The step's loss, gradients by HF name, and their norm."""

    loss: float
    gradients: dict[str, Tensor]
    norm: float


@cache
def expected(name: str) -> Expected:
    policy, reference = models(name)
    loss = align_loss(policy, reference, reward_groups(), objective("exo_rw"))
    loss.backward()
    names = {"lm_head.weight": "embed_out.weight"} if name == "gpt_neox" else {}  # as transformers calls it in files
    gradients = {names.get(key, key): p.grad for key, p in policy.named_parameters() if p.grad is not None}
    return Expected(loss.item(), gradients, torch.cat([g.flatten() for g in gradients.values()]).norm().item())


def stage_config(name: str, topology: str, root: Path) -> dict[str, Any]:
    settings = TOPOLOGIES[topology]
    return {
        "output": root / "runs" / f"{name} {topology}",
        "model": {"checkpoint": root / f"{name}-policy"},
        "reference": {"checkpoint": root / f"{name}-reference"},
        "data": {"path": str(root / "rewards.jsonl"), "tokenizer": root / "tokenizer"},
        "parallel": settings["parallel"],
        "compute": {
            "precision": "fp32",
            "recompute": settings["recompute"],
            "max_tokens_per_microbatch": settings.get("max_tokens", MAX_TOKENS),
            "logits_memory_mib": 1024,
        },
        "batch": {"groups": len(reward_groups()), "max_steps": 1},
        "loss": vars(objective("exo_rw")),
        "log": {"tensorboard": False},
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gradients")
    for name in MODELS:
        for role, model in zip(("policy", "reference"), models(name), strict=True):
            save_hf(model, directory / f"hf-{name}-{role}")
    # Beside Qwen's config.json, transformers would add a token to it.
    tiny_tokenizer().save_pretrained(directory / "tokenizer")
    write_records(directory / "rewards.jsonl", reward_groups(), fields="rewards")
    return directory


@pytest.fixture(scope="module")
def outcomes(root: Path) -> Iterator[dict[str, Outcome]]:
    here = "tests.multiprocess.align_checks"
    checks = [
        Check(f"import {which}", f"{here}:import_checkpoint", {"hf": root / f"hf-{which}", "output": root / which})
        for which in (f"{name}-{role}" for name in MODELS for role in ("policy", "reference"))
    ]
    for name, topology in CASES:
        checks.append(Check(f"{name} {topology}", f"{here}:align", {"config": stage_config(name, topology, root)}))
    result = run_checks(2, checks, root / "workers")
    yield result
    if "PARITY_REPORT" in os.environ:
        print_margins(result)


def gradients_by_hf_name(name: str, records: Sequence[RankRecord]) -> dict[str, Tensor]:
    """Of the first step. With tied embeddings the last stage's copy must have the same gradient as the first's."""
    values = LANGUAGE_MODELS[name].config().to_dict()
    values["architectures"] = None
    family = find_family(values, name)
    spec = family.read_config(values, name)
    whole: dict[str, Tensor] = {}
    for stage in {record.pipeline_rank for record in records}:
        ranks = sorted((r for r in records if r.pipeline_rank == stage), key=lambda record: record.tensor_rank)
        whole |= whole_tensors([record.gradients[0] for record in ranks], gated=spec.gated)
    if spec.tied_embeddings and "output_layer.weight" in whole:
        assert torch.equal(whole.pop("output_layer.weight"), whole["embedding.word_embeddings.weight"])
    result: dict[str, Tensor] = {}
    for rule in family.tensors(spec):
        for entry in rule.entries():
            local = rule.key.replace("decoder.layers.", "decoder.layers.{}.").format(*entry.index)
            result |= zip(entry.sources, rule.transform.split(whole.pop(local)), strict=True)
    assert not whole
    return result


def relative_errors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference over the largest entry."""
    return {name: ((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in theirs}


@pytest.mark.parametrize(("name", "topology"), CASES)
def test_loss_and_gradient_norm(name: str, topology: str, outcomes: dict[str, Outcome]) -> None:
    for record in outcomes[f"{name} {topology}"].values():
        (line,) = record.metrics
        assert line["loss"] == pytest.approx(expected(name).loss, rel=LOSS_TOLERANCE)
        assert line["grad_norm"] == pytest.approx(expected(name).norm, rel=GRADIENT_TOLERANCE)


@pytest.mark.parametrize(("name", "topology"), CASES)
def test_every_gradient(name: str, topology: str, outcomes: dict[str, Outcome]) -> None:
    ours = gradients_by_hf_name(name, outcomes[f"{name} {topology}"].values())
    assert ours.keys() == expected(name).gradients.keys()
    errors = relative_errors(ours, expected(name).gradients)
    worst = max(errors, key=lambda tensor: errors[tensor])
    assert errors[worst] < GRADIENT_TOLERANCE, f"{worst}: {errors[worst]:.2e}"


def print_margins(outcomes: dict[str, Outcome]) -> None:
    for name, topology in CASES:
        outcome = outcomes[f"{name} {topology}"]
        if outcome.failure is None:
            (line,) = outcome.values()[0].metrics
            loss = abs(line["loss"] / expected(name).loss - 1)
            errors = relative_errors(gradients_by_hf_name(name, outcome.values()), expected(name).gradients)
            print(f"{name} {topology}: loss {loss:.1e}, gradients {max(errors.values()):.1e}")
