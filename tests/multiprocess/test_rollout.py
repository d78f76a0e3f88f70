"""Generation and scoring at every topology against Hugging Face's model, a full forward pass per token."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from exo_megatron.checkpoint.directory import read_fingerprint
from exo_megatron.data.groups import Group
from exo_megatron.data.logprob_source import LogprobSource
from exo_megatron.rollout.sampling import uniforms
from exo_megatron.utils.files import read_json
from tests.multiprocess.harness import Check, Outcome, run_checks
from tests.reference.candidates import read_candidates
from tests.reference.tiny_llama import EOS_ID, VOCAB_SIZE, save_hf, text, tiny_config, tiny_llama, word

HERE = "tests.multiprocess.rollout_checks"
SEED = 11
K = 3
STEPS = 14
LENGTHS = (5, 1, 31, 12, 2, 19, 7)
TOPOLOGIES = {
    "dp4": {"tensor": 1, "pipeline": 1},
    "tp2dp2": {"tensor": 2, "pipeline": 1},
    "tp2dp2-nosp": {"tensor": 2, "pipeline": 1, "sequence": False},
    "pp2dp2": {"tensor": 1, "pipeline": 2},
    "tp2pp2": {"tensor": 2, "pipeline": 2},
}
SAMPLED = {"candidates": K, "temperature": 0.8, "max_new_tokens": STEPS}
SAMPLINGS = {
    "all at once": {**SAMPLED, "max_active_candidates": 100},
    "fewer slots than K": {**SAMPLED, "max_active_candidates": 2},
    "some slots": {**SAMPLED, "max_active_candidates": 7},
    "top-p": {**SAMPLED, "max_active_candidates": 8, "top_p": 0.7},
    "one token": {**SAMPLED, "max_active_candidates": 8, "max_new_tokens": 1},
    "greedy": {"candidates": 1, "temperature": 1e-4, "max_new_tokens": STEPS, "max_active_candidates": 4},
}

Drawn = tuple[list[int], list[float]]  # token ids, their log-probs


def prompts() -> list[tuple[str, tuple[int, ...]]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (f"prompt-{i}", tuple(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()))
        for i, length in enumerate(LENGTHS)
    ]


def next_logits(model: LlamaForCausalLM, ids: Sequence[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0, -1].double().numpy()


def hf_draw(model: LlamaForCausalLM, ids: Sequence[int], numbers: np.ndarray, top_p: float) -> Drawn:
    """STEPS tokens, each from a full forward pass; the definition of the draw, written once more."""
    tokens: list[int] = []
    logprobs: list[float] = []
    for number in numbers:
        scaled = next_logits(model, [*ids, *tokens]) / SAMPLED["temperature"]
        log_p = scaled - scaled.max() - math.log(np.exp(scaled - scaled.max()).sum())
        order = np.argsort(-log_p, kind="stable")
        mass = np.exp(log_p[order]).cumsum()
        kept = np.sort(order[: 1 + int(np.searchsorted(mass, top_p))]) if top_p < 1 else np.arange(len(log_p))
        shares = np.exp(log_p[kept]).cumsum()
        token = int(kept[np.searchsorted(shares, number * shares[-1], side="right")])
        tokens.append(token)
        logprobs.append(float(log_p[token]))
    return tokens, logprobs


@dataclass(frozen=True)
class Reference:
    """Per top-p, prompt and candidate: what HF draws without any end of sequence."""

    weights: Path
    model: LlamaForCausalLM
    eos_id: int
    drawn: dict[float, list[list[Drawn]]]

    def cut(self, drawn: Drawn, steps: int = STEPS) -> tuple[tuple[int, ...], bool, float]:
        """Up to the end of sequence or the length limit: ids, finished, log-prob."""
        tokens, logprobs = drawn[0][:steps], drawn[1][:steps]
        finished = self.eos_id in tokens
        length = tokens.index(self.eos_id) + 1 if finished else len(tokens)
        return tuple(tokens[:length]), finished, sum(logprobs[:length])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    model = tiny_llama(tiny_config(), seed=1).eval()
    weights = tmp_path_factory.mktemp("weights") / "llama.pt"
    torch.save((model.config, model.state_dict()), weights)
    drawn = {
        top_p: [
            [hf_draw(model, ids, numbers, top_p) for numbers in uniforms(SEED, name, candidates=K, steps=STEPS)]
            for name, ids in prompts()
        ]
        for top_p in (1.0, 0.7)
    }
    # The end of sequence is a token that ends about half of the candidates.
    contents = [set(tokens) for group in drawn[1.0] for tokens, _ in group]
    counts = [sum(token in content for content in contents) for token in range(VOCAB_SIZE)]
    eos_id = min(range(VOCAB_SIZE), key=lambda token: abs(counts[token] - len(contents) // 2))
    assert 3 <= counts[eos_id] <= len(contents) - 3
    return Reference(weights, model, eos_id, drawn)


def scored_groups(reference: Reference) -> list[Group]:
    """The drawn candidates of each prompt; the last group has one candidate only."""
    groups = []
    for i, (name, ids) in enumerate(prompts()):
        count = 1 if i == len(LENGTHS) - 1 else K
        drawn = [reference.cut(candidate)[0] for candidate in reference.drawn[1.0][i][:count]]
        groups.append(Group(id=name, prompt=ids, candidates=tuple(drawn)))
    return groups


@pytest.fixture(scope="module")
def stage_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stage")


def stage_arguments(reference: Reference, directory: Path) -> dict[str, Any]:
    """The stage on the same prompts, as text; settings that must be refused, and the first words of why."""
    data = directory / "prompts.jsonl"
    data.write_text("".join(json.dumps({"id": name, "prompt": text(ids)}) + "\n" for name, ids in prompts()))
    config = {
        "seed": SEED,
        "data": {"path": str(data)},
        "parallel": TOPOLOGIES["tp2pp2"],
        "compute": {"precision": "fp32"},
        "sampling": SAMPLINGS["some slots"],
    }
    failing = [
        {"sampling": {"max_new_tokens": 226}},
        {"parallel": {"tensor": 4}},
        {"data": {"path": str(data), "max_prompt_tokens": 30}},
        {"compute": {"precision": "fp32", "max_tokens_per_microbatch": 45}},
    ]
    hf = save_hf(reference.model, directory / "hf")
    return {"hf": hf, "output": directory / "output", "config": config, "failing": failing}


@pytest.fixture(scope="module")
def outcomes(
    reference: Reference, stage_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    checks = []
    for name, parallel in TOPOLOGIES.items():
        common = {"weights": reference.weights, "parallel": parallel}
        drawing = {"prompts": prompts(), "eos_id": reference.eos_id, "seed": SEED}
        checks.append(Check(name, f"{HERE}:generate", {**common, **drawing, "samplings": list(SAMPLINGS.values())}))
        scoring = {"groups": scored_groups(reference), "max_tokens": 90, "temperature": 0.8}
        checks.append(Check(f"{name} score", f"{HERE}:score", {**common, **scoring}))
    bf16 = {"samplings": [SAMPLINGS["some slots"]], "precision": "bf16", "parallel": TOPOLOGIES["tp2pp2"]}
    checks.append(Check("bf16", f"{HERE}:generate", {"weights": reference.weights, **drawing, **bf16}))
    checks.append(Check("stage", f"{HERE}:run_stage", stage_arguments(reference, stage_directory)))
    return run_checks(4, checks, tmp_path_factory.mktemp("rollout"))


@pytest.mark.parametrize("sampling", [name for name in SAMPLINGS if name != "greedy"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_draws_are_those_of_hf(
    reference: Reference, outcomes: dict[str, Outcome], topology: str, sampling: str
) -> None:
    settings = SAMPLINGS[sampling]
    drawn = reference.drawn[settings.get("top_p", 1.0)]
    for results in outcomes[topology].values():
        groups, _ = results[list(SAMPLINGS).index(sampling)]
        assert [group.prompt_id for group in groups] == [name for name, _ in prompts()]
        for group, expected_group in zip(groups, drawn, strict=True):
            assert len(group.candidates) == K
            for candidate, expected in zip(group.candidates, expected_group, strict=True):
                ids, finished, logprob = reference.cut(expected, settings["max_new_tokens"])
                assert candidate.token_ids == ids
                assert candidate.finished == finished
                assert candidate.logprob == pytest.approx(logprob, abs=1e-4)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_vanishing_temperature_is_greedy(reference: Reference, outcomes: dict[str, Outcome], topology: str) -> None:
    for results in outcomes[topology].values():
        groups, _ = results[list(SAMPLINGS).index("greedy")]
        for group, (_, ids) in zip(groups, prompts(), strict=True):
            sequence = torch.tensor([ids])
            hf = reference.model.generate(
                sequence,
                attention_mask=torch.ones_like(sequence),
                do_sample=False,
                max_new_tokens=STEPS,
                eos_token_id=reference.eos_id,
                pad_token_id=0,
            )
            assert group.candidates[0].token_ids == tuple(hf[0, len(ids) :].tolist())


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_records_of_the_whole_world(reference: Reference, outcomes: dict[str, Outcome], topology: str) -> None:
    by_rank = outcomes[topology].values()
    for sampling in range(len(SAMPLINGS)):
        groups, records = by_rank[0][sampling]
        assert records is not None
        assert all(results[sampling][1] is None for results in by_rank[1:])
        for record, group, (name, ids) in zip(records, groups, prompts(), strict=True):
            assert (record.id, record.prompt, record.prompt_ids) == (name, f"text of {name}", ids)
            assert record.rewards is None
            for stored, candidate in zip(record.candidates, group.candidates, strict=True):
                assert (stored.token_ids, stored.finished) == (candidate.token_ids, candidate.finished)
                assert stored.logprob == pytest.approx(candidate.logprob, abs=1e-4)
                assert stored.text == " ".join(str(token) for token in candidate.token_ids)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_scores_are_hf_logprobs(reference: Reference, outcomes: dict[str, Outcome], topology: str) -> None:
    groups = scored_groups(reference)
    for results in outcomes[f"{topology} score"].values():
        assert len(results) == len(groups)
        for index, (result, group) in enumerate(zip(results, groups, strict=True)):
            drawn = reference.drawn[1.0][index][: len(group.candidates)]
            assert result == pytest.approx([reference.cut(candidate)[2] for candidate in drawn], abs=1e-4)


def test_bf16_generates_likely_tokens(reference: Reference, outcomes: dict[str, Outcome]) -> None:
    """Rounding may change a draw; the first tokens of nearly all candidates stay, with close log-probs."""
    by_rank = outcomes["bf16"].values()
    assert all(results == by_rank[0] or results[0][1] is None for results in by_rank)
    same = 0
    for group, expected_group in zip(by_rank[0][0][0], reference.drawn[1.0], strict=True):
        for candidate, expected in zip(group.candidates, expected_group, strict=True):
            same += candidate.token_ids[0] == expected[0][0]
    assert same >= 0.8 * len(LENGTHS) * K


def test_stage_writes_candidates_and_how_they_were_drawn(
    reference: Reference, outcomes: dict[str, Outcome], stage_directory: Path
) -> None:
    messages = outcomes["stage"].values()[0]
    output = stage_directory / "output"
    records = read_candidates(output / "rollout")
    for record, (name, ids), expected_group in zip(records, prompts(), reference.drawn[1.0], strict=True):
        assert (record.id, record.prompt, record.prompt_ids) == (name, text(ids), ids)
        for candidate, (tokens, logprobs) in zip(record.candidates, expected_group, strict=True):
            length = tokens.index(EOS_ID) + 1 if EOS_ID in tokens else STEPS
            assert candidate.token_ids == tuple(tokens[:length])
            assert candidate.finished == (EOS_ID in tokens)
            assert candidate.logprob == pytest.approx(sum(logprobs[:length]), abs=1e-4)
            assert candidate.text.split() == [word(token) for token in tokens[:length] if token > EOS_ID]
    settings = SAMPLINGS["some slots"]
    source = LogprobSource(read_fingerprint(output / "model"), settings["temperature"], "fp32")
    for record in records:
        assert record.logprob_source == source
        for candidate in record.candidates:
            assert candidate.logprob_digest == source.digest(record.prompt_ids, candidate.token_ids)
    described = read_json(output / "rollout" / "rollout.json")
    assert 0 < described.pop("decoding_difference") < 1e-5
    assert described == {
        "checkpoint": str(output / "model"),
        "fingerprint": read_fingerprint(output / "model"),
        "temperature": settings["temperature"],
        "precision": "fp32",
        "top_p": 1.0,
        "candidates": K,
        "max_new_tokens": STEPS,
        "seed": SEED,
        "prompts": len(LENGTHS),
    }
    assert "prompt 'prompt-2'" in messages[0] and "31 tokens + sampling.max_new_tokens 226 = 257" in messages[0]
    assert messages[1].startswith("parallel.tensor: 4 does not divide")
    assert "30" in messages[2]
    # 31 + 14 tokens in micro-batches that tensor parallelism makes even.
    assert "prompt 'prompt-2'" in messages[3] and "at most 44, one packed micro-batch" in messages[3]
    assert len(messages) == 4
    assert [path.name for path in (output / "failed").iterdir()] == ["data_report.json"]


def test_units_do_not_change_the_draws_nor_does_an_interruption(
    outcomes: dict[str, Outcome], stage_directory: Path
) -> None:
    """In shards of two prompts, on four ranks: the ids of one unit, and the bytes of an undisturbed run."""
    outcomes["stage"].values()
    whole, units, cut = (stage_directory / "output" / name for name in ("rollout", "units", "cut"))
    assert sorted(path.name for path in (units / "candidates").glob("*.jsonl")) == [
        f"shard-0000{n}-of-00004.jsonl" for n in range(4)
    ]
    for one, other in zip(read_candidates(whole), read_candidates(units), strict=True):
        assert replace(one, candidates=()) == replace(other, candidates=())
        for ours, theirs in zip(one.candidates, other.candidates, strict=True):
            assert replace(ours, logprob=None) == replace(theirs, logprob=None)
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
    files = {path.relative_to(units): path.read_bytes() for path in units.rglob("*") if path.is_file()}
    assert len(files) == 2 * 4 + 2  # rollout.json and data_report.json
    assert {path.relative_to(cut): path.read_bytes() for path in cut.rglob("*") if path.is_file()} == files
