"""Losses of the user's (`loss.function`) train one step on every kind of topology as plain PyTorch does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.multiprocess.align_case import FEWEST_TOKENS, Case, reward_groups
from tests.multiprocess.align_checks import RankRecord
from tests.multiprocess.harness import Check, Outcome, run_checks
from tests.multiprocess.own_loss import CLIP, KL_WEIGHT
from tests.multiprocess.test_align_parity import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    in_hf_names,
    models,
    relative_error,
    stage_config,
    steps_of,
)
from tests.reference.objective import ReferenceGroup, token_logprobs
from tests.reference.tiny_llama import save_hf, text
from tests.reference.weights import perturbed

PER_TOKEN = [Case(2, 1, 1), Case(1, 2, 1), Case(1, 1, 2)]
WEIGHTED = [Case(2, 1, 1), Case(1, 1, 2, max_tokens=FEWEST_TOKENS), Case(1, 2, 1, max_tokens=FEWEST_TOKENS)]
TAU = 0.8


def behaviour_policy() -> LlamaForCausalLM:
    """Neither policy nor reference, and far enough from the policy that some ratios are clipped."""
    return perturbed(models(tied=False)[0], seed=13, scale=0.1)


def log_weights(index: int, group: ReferenceGroup) -> list[float]:
    return [0.1 * index - 0.2 * k for k in range(len(group.candidates))]


def write_data(path: Path) -> Path:
    reference, behaviour = models(tied=False)[1], behaviour_policy()

    def tokens(model: LlamaForCausalLM, group: ReferenceGroup) -> list[list[float]]:
        with torch.no_grad():
            return [token_logprobs(model, group.prompt, y, TAU).tolist() for y in group.candidates]

    records = [
        {
            "prompt": text(group.prompt),
            "completions": [text(candidate[:-1]) for candidate in group.candidates],
            "rewards": list(group.rewards),
            "log_weights": log_weights(index, group),
            "reference_token_logprobs": tokens(reference, group),
            "behaviour_token_logprobs": tokens(behaviour, group),
        }
        for index, group in enumerate(reward_groups())
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def expected_loss(policy: LlamaForCausalLM, group: ReferenceGroup, index: int) -> tuple[Tensor, int]:
    """The loss of one group, candidate after candidate and token after token, and how many ratios were clipped."""
    reference, behaviour = models(tied=False)[1], behaviour_policy()
    mean = sum(group.rewards) / len(group.rewards)
    total, clipped = torch.zeros((), dtype=torch.float64), 0
    for k, candidate in enumerate(group.candidates):
        own = token_logprobs(policy, group.prompt, candidate, TAU).double()
        with torch.no_grad():
            ref = token_logprobs(reference, group.prompt, candidate, TAU).double()
            old = token_logprobs(behaviour, group.prompt, candidate, TAU).double()
        values = []
        for t in range(len(candidate)):
            ratio, advantage = torch.exp(own[t] - old[t]), group.rewards[k] - mean
            value = float(ratio.detach())
            bound = min(max(value, 1 - CLIP), 1 + CLIP)
            bounded = torch.tensor(bound, dtype=torch.float64) if bound != value else ratio
            clipped += bool(bound * advantage < value * advantage)
            surrogate = bounded * advantage if bound * advantage < value * advantage else ratio * advantage
            values.append(-surrogate + KL_WEIGHT * (torch.exp(ref[t] - own[t]) - (ref[t] - own[t]) - 1))
        weight = torch.tensor(log_weights(index, group)[k], dtype=torch.float64).exp()
        total = total + weight * torch.stack(values).mean()
    return total, clipped


def expected_weighted(policy: LlamaForCausalLM, group: ReferenceGroup, index: int) -> Tensor:
    reference, total = models(tied=False)[1], torch.zeros((), dtype=torch.float64)
    for k, candidate in enumerate(group.candidates):
        own = token_logprobs(policy, group.prompt, candidate, TAU).double().sum()
        with torch.no_grad():
            ref = token_logprobs(reference, group.prompt, candidate, TAU).double().sum()
        weight = torch.tensor(log_weights(index, group)[k], dtype=torch.float64).exp()
        total = total - weight * group.rewards[k] * (own - ref)
    return total


def own_config(case: Case, name: str, root: Path, data: Path) -> dict[str, Any]:
    config = stage_config(case, root)
    config["output"] = root / f"{case.name}-{name}"
    config["data"] = {"path": str(data)}
    config["loss"] = {"function": f"tests.multiprocess.own_loss:{name}", "temperature": TAU}
    config["batch"] |= {"max_steps": 1}
    return config


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    root = tmp_path_factory.mktemp("own-loss")
    checks = "tests.multiprocess.align_checks"
    work = []
    for name, model in zip(("policy", "reference"), models(tied=False), strict=True):
        save_hf(model, root / f"hf-{name}")
        arguments = {"hf": root / f"hf-{name}", "output": root / f"{name}-untied"}
        work.append(Check(f"import-{name}", f"{checks}:import_checkpoint", arguments))
    data = write_data(root / "own.jsonl")
    for name, cases in (("clipped", PER_TOKEN), ("weighted", WEIGHTED)):
        for case in cases:
            config = own_config(case, name, root, data)
            work.append(Check(f"{name}-{case.name}", f"{checks}:align", {"config": config}))
    return run_checks(2, work, root / "workers")


def compare(records: Sequence[RankRecord], case: Case, loss: Tensor, policy: LlamaForCausalLM) -> None:
    """Compare loss and gradient of the first step with those of `loss`, a function of the policy's weights."""
    loss.backward()
    theirs = {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.grad is not None}
    for record in records:
        assert record.metrics[0]["loss"] == pytest.approx(loss.item(), rel=LOSS_TOLERANCE)
    ours = in_hf_names(records, case, lambda record: record.gradients[0])
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert relative_error(ours[name], gradient) < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("case", PER_TOKEN, ids=lambda case: case.name)
def test_one_step_is_that_of_plain_pytorch(outcomes: dict[str, Outcome], case: Case) -> None:
    policy = models(tied=False)[0]
    groups = reward_groups()
    first = steps_of(groups, case.groups_per_step)[0]
    results = [expected_loss(policy, group, groups.index(group)) for group in first]
    assert sum(clipped for _, clipped in results) > 3  # the clipping counts
    loss = torch.stack([value for value, _ in results]).mean()
    compare(outcomes[f"clipped-{case.name}"].values(), case, loss, policy)


@pytest.mark.parametrize("case", WEIGHTED, ids=lambda case: case.name)
def test_importance_weights_of_whole_and_oversized_groups(outcomes: dict[str, Outcome], case: Case) -> None:
    policy = models(tied=False)[0]
    groups = reward_groups()
    first = steps_of(groups, case.groups_per_step)[0]
    loss = torch.stack([expected_weighted(policy, group, groups.index(group)) for group in first]).mean()
    records = outcomes[f"weighted-{case.name}"].values()
    assert (records[0].metrics[0]["oversized_groups"] > 0) == (case.max_tokens == FEWEST_TOKENS)
    compare(records, case, loss, policy)
