"""Log-probs that a rollout stored are those that `align` would compute, at another topology, and take their place."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from exo_megatron.checkpoint.directory import read_fingerprint
from exo_megatron.data.candidates import CandidateRecord
from exo_megatron.utils.files import read_json
from tests.multiprocess.harness import Check, Outcome, run_checks
from tests.reference.candidates import read_candidates
from tests.reference.objective import token_logprobs
from tests.reference.tiny_llama import EOS_ID, VOCAB_SIZE, save_hf, text, tiny_config, tiny_llama
from tests.reference.weights import perturbed

HERE = "tests.multiprocess.stored_checks"
TEMPERATURE = 0.8
LENGTHS = (5, 1, 31, 12, 2, 19, 7, 9)
K = 3
PER_SHARD = (2, 3, 1)
"""Prompts a shard: 4 shards, one for each rank; 3, which the ranks share; 8, two for each rank."""
NATS_PER_TOKEN = 1e-5  # asked for: 1e-4; seen: 3e-7
DRAWN_AT = {"alone": {"tensor": 1}, "in four": {"tensor": 2, "pipeline": 2}}
ALIGNED_AT = {"tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}}
FP32 = {"precision": "fp32", "max_tokens_per_microbatch": 100, "logits_memory_mib": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stored")
    sft = model()
    save_hf(sft, directory / "hf" / "sft")
    save_hf(perturbed(sft, seed=4, scale=0.1), directory / "hf" / "start")
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]
    lines = (json.dumps({"id": f"prompt-{i}", "prompt": text(ids)}) + "\n" for i, ids in enumerate(prompts))
    (directory / "prompts.jsonl").write_text("".join(lines))
    return directory


def model() -> LlamaForCausalLM:
    """Its candidates have many lengths: some end by themselves, at once or later."""
    reference = tiny_llama(tiny_config(), seed=3).eval()
    with torch.no_grad():
        reference.lm_head.weight[EOS_ID] += 0.25
    return reference


def rollout_config(root: Path, parallel: dict[str, int]) -> dict[str, Any]:
    return {
        "seed": 7,
        "model": {"checkpoint": root / "sft"},
        "data": {"path": str(root / "prompts.jsonl")},
        "parallel": parallel,
        "compute": FP32,
        # Truncation does not touch what is stored: log-probs of the whole distribution.
        "sampling": {"candidates": K, "temperature": TEMPERATURE, "top_p": 0.9, "max_new_tokens": 14},
    }


def align_config(root: Path, kind: str, at: str, logprobs: str) -> dict[str, Any]:
    """Training starts elsewhere than at the reference, so that an error of the reference shows in the loss."""
    return {
        "output": root / f"{kind}-{at}-{logprobs}",
        "model": {"checkpoint": root / "start"},
        "reference": {"checkpoint": root / "sft"},
        "reference_logprobs": logprobs,
        "data": {"path": str(root / "scored-alone")},
        "loss": {"kind": kind, "beta_pi": 0.3, "temperature": TEMPERATURE},
        "parallel": ALIGNED_AT[at],
        "compute": FP32,
        "optimizer": {"lr": 1e-4},
        "batch": {"groups": 4, "max_steps": 2},
        "log": {"tensorboard": False},
    }


@pytest.fixture(scope="module")
def outcomes(root: Path) -> dict[str, Outcome]:
    preparing = {
        "hf": {name: root / "hf" / name for name in ("sft", "start")},
        "rollouts": {name: rollout_config(root, parallel) for name, parallel in DRAWN_AT.items()},
        "output": root,
        "edited": root / "edited.jsonl",
        "per_shard": PER_SHARD,
    }
    checks = [Check("prepare", f"{HERE}:prepare", preparing)]
    for kind, at in (("exo_rw", "tensor"), ("exo_rw", "pipeline"), ("exo_pref", "tensor")):
        for logprobs in ("stored", "computed"):
            config = align_config(root, kind, at, logprobs)
            checks.append(Check(f"{kind} {at} {logprobs}", f"{HERE}:align", {"config": config}))
    changes: list[dict[str, Any]] = [
        {"data": {"path": str(root / "edited.jsonl")}},
        {"reference": None},
        {"loss": {"temperature": 1.0}},
        {"compute": {**FP32, "precision": "bf16"}},
    ]
    config = {**align_config(root, "exo_rw", "tensor", "stored"), "output": root / "refused"}
    checks.append(Check("refusals", f"{HERE}:refusals", {"config": config, "changes": changes}))
    edited = {**align_config(root, "exo_rw", "tensor", "computed"), **changes[0], "output": root / "edited"}
    checks.append(Check("edited computed", f"{HERE}:align", {"config": edited}))
    return run_checks(4, checks, root / "workers")


def stored(root: Path, outcomes: dict[str, Outcome], name: str) -> list[CandidateRecord]:
    outcomes["prepare"].values()
    return read_candidates(root / f"scored-{name}")


def differences(records: list[CandidateRecord], others: list[tuple[float, ...]]) -> list[float]:
    """Per token, in nats."""
    return [
        abs(candidate.logprob - value) / len(candidate.token_ids)
        for record, values in zip(records, others, strict=True)
        for candidate, value in zip(record.candidates, values, strict=True)
        if candidate.logprob is not None
    ]


@pytest.mark.parametrize("drawn", DRAWN_AT)
def test_stored_log_probs_are_those_of_hf(root: Path, outcomes: dict[str, Outcome], drawn: str) -> None:
    reference = model()
    records = stored(root, outcomes, drawn)
    with torch.no_grad():
        expected = [
            tuple(
                token_logprobs(reference, record.prompt_ids, c.token_ids, TEMPERATURE).double().sum().item()
                for c in record.candidates
            )
            for record in records
        ]
    found = differences(records, expected)
    assert len(found) == K * len(LENGTHS)
    assert max(found) < NATS_PER_TOKEN
    assert len({len(c.token_ids) for c in chain.from_iterable(r.candidates for r in records)}) > 3


@pytest.mark.parametrize("at", ALIGNED_AT)
@pytest.mark.parametrize("drawn", DRAWN_AT)
def test_stored_log_probs_are_those_that_align_computes(
    root: Path, outcomes: dict[str, Outcome], drawn: str, at: str
) -> None:
    outcomes[f"exo_rw {at} computed"].values()
    computed = read_json(root / f"exo_rw-{at}-computed" / "reference_logprobs.json")["logps"]
    found = differences(stored(root, outcomes, drawn), computed)
    assert len(found) == K * len(LENGTHS)
    assert max(found) < NATS_PER_TOKEN


@pytest.mark.parametrize(("kind", "at"), [("exo_rw", "tensor"), ("exo_rw", "pipeline"), ("exo_pref", "tensor")])
def test_the_same_losses_without_a_scoring_pass(root: Path, outcomes: dict[str, Outcome], kind: str, at: str) -> None:
    with_stored = outcomes[f"{kind} {at} stored"].values()
    with_computed = outcomes[f"{kind} {at} computed"].values()
    assert {trained.scored for trained in with_stored} == {0}
    assert {trained.scored for trained in with_computed} == {len(LENGTHS)}
    assert not (root / f"{kind}-{at}-stored" / "reference_logprobs.json").exists()
    assert len(with_stored[0].metrics) == 2
    for ours, theirs in zip(with_stored[0].metrics, with_computed[0].metrics, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "exo/kl"):
            assert abs(theirs[name]) > 1e-3
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name


def test_what_score_writes_is_what_rollout_wrote(root: Path, outcomes: dict[str, Outcome]) -> None:
    scored = stored(root, outcomes, "alone")
    drawn = read_candidates(root / "rollout-alone")
    assert [(r.candidates, r.logprob_source) for r in scored] == [(r.candidates, r.logprob_source) for r in drawn]
    assert len({reward for record in scored for reward in record.rewards or ()}) > len(LENGTHS)
    difference = read_json(root / "scored-alone" / "rollout.json")["decoding_difference"]
    assert 0 < difference < NATS_PER_TOKEN


@pytest.mark.parametrize("size", PER_SHARD)
def test_ranks_score_shards_of_any_size_alike(root: Path, outcomes: dict[str, Outcome], size: int) -> None:
    expected = stored(root, outcomes, "alone")
    assert read_candidates(root / f"scored-by-{size}") == expected
    assert len(list((root / f"scored-by-{size}" / "candidates").glob("*.jsonl"))) == -(-len(LENGTHS) // size)
    summaries = [read_json(root / name / "score.json") for name in (f"scored-by-{size}", "scored-alone")]
    assert summaries[0] == pytest.approx(summaries[1], rel=1e-12)


def test_mismatches_say_what_differs(root: Path, outcomes: dict[str, Outcome]) -> None:
    data, checkpoint, temperature, precision = outcomes["refusals"].values()[0]
    assert data.startswith(f"{root / 'edited.jsonl'}:2: ")
    assert "record 'prompt-1' are of other data (token ids of prompt or candidates[0]" in data
    shard = root / "scored-alone" / "candidates" / "shard-00000-of-00001.jsonl"
    first = f"{shard}:1: the stored log-probs of record 'prompt-0' are of"
    number = len(LENGTHS)
    all_of_them = f" (of {number} records {number} cannot be used: {number} log-probs of another source)"
    drew, starts = (read_fingerprint(root / name)[:16] for name in ("sft", "start"))
    found = f"{first} the model with fingerprint {drew}{all_of_them}"
    assert f"{found}; expected the reference {root / 'start'}" in checkpoint
    assert f"with fingerprint {starts}; fix: set reference.checkpoint" in checkpoint
    found = f"{first} temperature 0.8{all_of_them}"
    assert f"{found}; expected temperature 1.0; fix: set loss.temperature=0.8, or" in temperature
    found = f"{first} precision fp32{all_of_them}"
    assert f"{found}; expected precision bf16; fix: set compute.precision=fp32, or" in precision
    for message in (data, checkpoint, temperature, precision):
        assert message.endswith("or set reference_logprobs=computed to compute them anew")
    names = [path.name for path in (root / "refused").iterdir()]
    assert names == ["data_report.json"], "told before anything else is written"
    assert {trained.scored for trained in outcomes["edited computed"].values()} == {len(LENGTHS)}
