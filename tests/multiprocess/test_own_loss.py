"""A loss of the user's (`loss.function`) trains one step under tensor parallelism as plain PyTorch does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.multiprocess.align_case import Case, reward_groups
from tests.multiprocess.align_checks import RankRecord
from tests.multiprocess.harness import Check, run_checks
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

CASE = Case(2, 1, 1)
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


def own_config(root: Path, data: Path, **loss: Any) -> dict[str, Any]:
    config = stage_config(CASE, root)
    config["data"] = {"path": str(data)}
    config["loss"] = {"function": "tests.multiprocess.own_loss:clipped", "temperature": TAU, **loss}
    config["batch"] |= {"max_steps": 1}
    return config


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[RankRecord, ...]:
    root = tmp_path_factory.mktemp("own-loss")
    checks = "tests.multiprocess.align_checks"
    imports = []
    for name, model in zip(("policy", "reference"), models(tied=False), strict=True):
        save_hf(model, root / f"hf-{name}")
        arguments = {"hf": root / f"hf-{name}", "output": root / f"{name}-untied"}
        imports.append(Check(f"import-{name}", f"{checks}:import_checkpoint", arguments))
    config = own_config(root, write_data(root / "own.jsonl"))
    outcomes = run_checks(2, [*imports, Check("own", f"{checks}:align", {"config": config})], root / "workers")
    return outcomes["own"].values()


def test_one_step_is_that_of_plain_pytorch(records: tuple[RankRecord, ...]) -> None:
    policy = models(tied=False)[0]
    groups = reward_groups()
    first = steps_of(groups, CASE.groups_per_step)[0]
    results = [expected_loss(policy, group, groups.index(group)) for group in first]
    assert sum(clipped for _, clipped in results) > 3  # the clipping counts
    loss = torch.stack([value for value, _ in results]).mean()
    loss.backward()
    theirs = {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.grad is not None}
    for record in records:
        assert record.metrics[0]["loss"] == pytest.approx(loss.item(), rel=LOSS_TOLERANCE)
    ours = in_hf_names(records, CASE, lambda record: record.gradients[0])
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert relative_error(ours[name], gradient) < GRADIENT_TOLERANCE, name
