"""The evaluate stage at two topologies: its rewards and KL against Hugging Face's models on the samples it stored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from exo_megatron.data.candidates import CandidateRecord
from exo_megatron.evaluation.prompt_means import read_prompt_means
from exo_megatron.utils.files import read_json
from tests.multiprocess.evaluate_checks import score
from tests.multiprocess.harness import Check, Outcome, run_checks
from tests.reference.candidates import read_candidates
from tests.reference.tiny_llama import EOS_ID, VOCAB_SIZE, save_hf, text, tiny_config, tiny_llama
from tests.reference.weights import perturbed

HERE = "tests.multiprocess.evaluate_checks"
TEMPERATURE = 0.8
PROMPTS = 9
SAMPLES = 3
TOPOLOGIES = {"data parallel": {"tensor": 1}, "tensor parallel": {"tensor": 2}}


def base_config(directory: Path) -> dict[str, Any]:
    return {
        "output": directory / "refused",
        "seed": 4,
        "models": {"near": directory / "near", "far": directory / "far"},
        "reference": {"checkpoint": directory / "reference"},
        "data": {"path": str(directory / "prompts.jsonl")},
        "sampling": {"candidates": SAMPLES, "temperature": TEMPERATURE, "max_new_tokens": 12},
        "reward": {"function": f"{HERE}:score"},
        # Fewer than a prompt with its three samples may need.
        "compute": {"precision": "fp32", "max_tokens_per_microbatch": 40},
        "sample_texts": 2,
    }


@pytest.fixture(scope="module")
def models() -> dict[str, LlamaForCausalLM]:
    reference = tiny_llama(tiny_config(), seed=1)
    with torch.no_grad():
        reference.lm_head.weight[EOS_ID] += 0.25  # so that some samples end by themselves
    scales = {"near": 0.02, "far": 0.2}
    return {"reference": reference, **{n: perturbed(reference, seed=2, scale=s) for n, s in scales.items()}}


@pytest.fixture(scope="module")
def directory(models: dict[str, LlamaForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    for name, model in models.items():
        save_hf(model, root / "hf" / name)
    generator = torch.Generator().manual_seed(5)
    lines = []
    for i in range(PROMPTS):
        ids = torch.randint(3, VOCAB_SIZE, (i + 2,), generator=generator).tolist()
        lines.append(json.dumps({"id": f"prompt-{i}", "prompt": text(ids)}) + "\n")
    (root / "prompts.jsonl").write_text("".join(lines))
    (root / "one.jsonl").write_text(lines[0])
    return root


@pytest.fixture(scope="module")
def outcomes(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    hf = {name: directory / "hf" / name for name in ("reference", "near", "far")}
    config = base_config(directory)
    checks = [Check("convert", f"{HERE}:convert", {"hf": hf, "output": directory})]
    for name, parallel in TOPOLOGIES.items():
        at = {**config, "output": directory / name, "parallel": parallel}
        checks.append(Check(name, f"{HERE}:evaluate", {"config": at}))
    changes = [
        {"models": {"reference": directory / "near"}},
        {"data": {"path": str(directory / "one.jsonl")}},
        {"compute": {"precision": "fp32", "max_tokens_per_microbatch": 20}},
        {"reward": {"function": f"{HERE}:no_such_function"}},
        {"models": {"near": directory / "nowhere"}},
    ]
    checks.append(Check("refusals", f"{HERE}:refusals", {"config": config, "changes": changes}))
    return run_checks(2, checks, tmp_path_factory.mktemp("evaluate-logs"))


def logprob(model: LlamaForCausalLM, prompt: Sequence[int], completion: Sequence[int]) -> float:
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        table = (model(ids).logits[0, len(prompt) - 1 : -1].double() / TEMPERATURE).log_softmax(dim=-1)
    return float(table.gather(1, torch.tensor(completion)[:, None]).sum())


def evaluation(outcomes: dict[str, Outcome], directory: Path, topology: str) -> dict[str, dict[str, Any]]:
    outcomes["convert"].values()
    outcomes[topology].values()
    return {each["name"]: each for each in read_json(directory / topology / "evaluation.json")["checkpoints"]}


def samples(directory: Path, topology: str, name: str) -> list[CandidateRecord]:
    return read_candidates(directory / topology / "samples" / f"{name}.jsonl")


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", ["reference", "near", "far"])
def test_reward_and_kl_of_the_stored_samples(
    outcomes: dict[str, Outcome], directory: Path, models: dict[str, LlamaForCausalLM], topology: str, name: str
) -> None:
    found = evaluation(outcomes, directory, topology)[name]
    records = samples(directory, topology, name)
    kl = torch.zeros(PROMPTS, SAMPLES, dtype=torch.float64)
    rewards = torch.zeros(PROMPTS, SAMPLES, dtype=torch.float64)
    for i, record in enumerate(records):
        assert record.id == f"prompt-{i}"
        for k, candidate in enumerate(record.candidates):
            policy = logprob(models[name], record.prompt_ids, candidate.token_ids)
            assert candidate.logprob == pytest.approx(policy, abs=1e-3)
            kl[i, k] = policy - logprob(models["reference"], record.prompt_ids, candidate.token_ids)
            rewards[i, k] = score([record.prompt], [candidate.text])[0]
    assert torch.tensor([r.rewards for r in records], dtype=torch.float64).equal(rewards)
    for key, values in (("kl", kl.mean(dim=1)), ("reward", rewards.mean(dim=1))):
        assert found[key] == pytest.approx(values.mean().item(), abs=1e-4)
        assert found[f"{key}_stderr"] == pytest.approx(values.std().item() / PROMPTS**0.5, abs=1e-4)
    assert (found["prompts"], found["samples"], found["step"]) == (PROMPTS, SAMPLES, None)


def test_kl_is_nothing_for_the_reference_and_grows_with_the_distance(
    outcomes: dict[str, Outcome], directory: Path
) -> None:
    found = evaluation(outcomes, directory, "data parallel")
    assert found["reference"]["kl"] == found["reference"]["kl_stderr"] == 0.0
    assert 0 < found["near"]["kl"] < 0.1 * found["far"]["kl"]
    assert 0 < found["reference"]["finished"] < 1


def test_values_of_every_prompt_average_to_the_estimates(outcomes: dict[str, Outcome], directory: Path) -> None:
    means = read_prompt_means(directory / "data parallel" / "prompts.jsonl")
    found = evaluation(outcomes, directory, "data parallel")
    assert set(means) == set(found)
    for name, each in found.items():
        assert each["reward"] == pytest.approx(means[name][None].rewards.mean(), abs=1e-12)
        assert each["kl"] == pytest.approx(means[name][None].kls.mean(), abs=1e-12)
        records = samples(directory, "data parallel", name)
        by_record = [sum(record.rewards or ()) / SAMPLES for record in records]
        assert means[name][None].rewards.tolist() == pytest.approx(by_record, abs=1e-12)


def test_samples_do_not_depend_on_the_topology(outcomes: dict[str, Outcome], directory: Path) -> None:
    for name in evaluation(outcomes, directory, "tensor parallel"):
        ids = [
            [candidate.token_ids for record in samples(directory, topology, name) for candidate in record.candidates]
            for topology in TOPOLOGIES
        ]
        assert ids[0] == ids[1]


def test_picture_report_and_nothing_else(outcomes: dict[str, Outcome], directory: Path) -> None:
    evaluation(outcomes, directory, "data parallel")
    output = directory / "data parallel"
    files = {"data_report.json", "evaluation.json", "prompts.jsonl", "frontier.png", "report.html", "samples"}
    assert {path.name for path in output.iterdir()} == files
    assert (output / "frontier.png").read_bytes().startswith(b"\x89PNG")
    page = (output / "report.html").read_text()
    for name in ("reference", "near", "far"):
        assert samples(directory, "data parallel", name)[0].candidates[0].text in page


def test_refused_before_any_model_is_loaded(outcomes: dict[str, Outcome], directory: Path) -> None:
    messages = outcomes["refusals"].values()[0]
    assert len(messages) == 5
    assert messages[0].startswith("models.reference: this name stands for the reference policy")
    assert "has 1 prompt; expected at least 2 prompts" in messages[1]
    assert messages[2].startswith("prompt 'prompt-7': 9 tokens + sampling.max_new_tokens 12")
    assert "has no function 'no_such_function'" in messages[3]
    assert "nowhere: does not exist" in messages[4]
    assert {path.name for path in (directory / "refused").iterdir()} == {"data_report.json"}
