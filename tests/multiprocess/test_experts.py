"""Mixture-of-experts models against Hugging Face in one process: log-probs, loss, every gradient, weights after three
steps, resumption at another cut, and generation with uneven work, over tensor, pipeline, expert and data ranks.

Choosing the experts of a token is discontinuous: where two router logits are nearly equal, rounding decides. The first
test says that no token of the test is near such a place. Tolerances: see test_align_parity.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from exo_megatron.data.groups import Group
from tests.multiprocess.align_case import FEWEST_TOKENS, MAX_TOKENS, objective, reward_groups
from tests.multiprocess.experts_checks import Trained, spec_of, whole_tensors
from tests.multiprocess.harness import Check, Outcome, run_checks
from tests.reference.objective import ReferenceGroup, align_loss, candidate_logprobs
from tests.reference.sharded import Place
from tests.reference.tiny_llama import EOS_ID
from tests.reference.tiny_models import LANGUAGE_MODELS, save_hf
from tests.reference.training import Adam, StepResult, train
from tests.reference.weights import perturbed

HERE = "tests.multiprocess.experts_checks"
LR = 2e-3
LOSS_TOLERANCE, GRADIENT_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4, 2e-3 * LR
SMALLEST_MARGIN = 2e-5
"""Of router logits, which agree to about 1e-6."""

ModelName = Literal["mixtral", "qwen3_moe"]


@dataclass(frozen=True)
class Case:
    """A cut, and a training run of three steps at it. saves: leaves a checkpoint after the first step.
    resumes: starts from the checkpoint that the case of this name left.
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    data: int = 1
    model: ModelName = "mixtral"
    recompute: Literal["none", "selective", "full"] = "none"
    precision: Literal["fp32", "bf16"] = "fp32"
    saves: bool = False
    resumes: str = ""
    max_tokens: int = MAX_TOKENS

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def name(self) -> str:
        cut = f"{self.model}-tp{self.tensor}pp{self.pipeline}ep{self.expert}dp{self.data}"
        limit = f"-tokens{self.max_tokens}" if self.max_tokens != MAX_TOKENS else ""
        return cut + f"-{self.recompute}-{self.precision}{limit}" + (f"-after-{self.resumes}" if self.resumes else "")

    @property
    def parallel(self) -> dict[str, Any]:
        return {"tensor": self.tensor, "pipeline": self.pipeline, "expert": self.expert}


ALONE = Case(saves=True)
SPREAD = Case(expert=2, data=2, saves=True)
CASES = [
    ALONE,
    Case(tensor=2, recompute="selective"),
    Case(tensor=2, expert=2, recompute="full"),
    Case(tensor=2, expert=2, model="qwen3_moe"),
    SPREAD,
    Case(expert=2, data=2, model="qwen3_moe", recompute="full"),
    Case(pipeline=2),
    Case(tensor=2, expert=2, resumes=ALONE.name),
    Case(tensor=2, expert=1, resumes=SPREAD.name),
    Case(expert=2, data=2, resumes=SPREAD.name),
    Case(tensor=2, pipeline=2, expert=2),
    Case(pipeline=2, expert=2, data=2, recompute="full"),
    Case(tensor=2, expert=4, data=2),
    # Oversized groups, on model copies that share experts: equal numbers of passes, some of padding.
    Case(expert=2, data=2, max_tokens=FEWEST_TOKENS),
    Case(pipeline=2, expert=2, data=2, recompute="full", max_tokens=FEWEST_TOKENS),
]
ROUGH = Case(expert=2, data=2, precision="bf16")
SCORED = [case for case in CASES if not case.resumes]
PROMPTS = [(f"p{i}", tuple(range(3 + i, 3 + i + length))) for i, length in enumerate((4, 9, 1, 6, 12))]
SAMPLING = {"candidates": 3, "max_new_tokens": 11, "max_active_candidates": 4, "temperature": 1.0}
GENERATED = [ALONE, SPREAD, Case(pipeline=2, expert=2, data=2)]


@cache
def models(name: ModelName) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Policy and reference. The weights of Qwen's experts are not normalised to a sum of one, Mixtral's are."""
    changes = {"norm_topk_prob": False} if name == "qwen3_moe" else {}
    reference = LANGUAGE_MODELS[name].model(seed=21, **changes)
    return perturbed(reference, seed=22, scale=0.1), reference


def steps_of_groups() -> list[list[ReferenceGroup]]:
    """Nine groups in three steps. In the second only one: of two model copies, one has nothing to do."""
    groups = reward_groups()
    return [groups[:5], groups[5:6], groups[6:]]


def our_steps(name: ModelName) -> list[list[Group]]:
    reference = models(name)[1]

    def ours(group: ReferenceGroup) -> Group:
        with torch.no_grad():
            logprobs = candidate_logprobs(reference, group, objective("exo_rw").temperature)
        return Group("g", group.prompt, group.candidates, group.rewards, tuple(logprobs.tolist()))

    return [[ours(group) for group in step] for step in steps_of_groups()]


@dataclass(frozen=True)
class Expected:
    """The reference's scores before, its steps, its weights after them, and the smallest router margin on the way."""

    logprobs: list[Tensor]
    steps: list[StepResult]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    margin: float


@cache
def expected(name: ModelName) -> Expected:
    policy, reference = models(name)
    policy = perturbed(policy, seed=0, scale=0.0)
    margins: list[float] = []
    for layer in policy.model.layers:
        layer.mlp.gate.register_forward_hook(lambda gate, _, result: margins.append(_margin(result[0], gate.top_k)))
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    with torch.no_grad():
        scores = [candidate_logprobs(policy, group, 0.8) for group in reward_groups()]
    adam = Adam((LR,) * 3, beta1=0.9, beta2=0.95, eps=1e-4, clip_grad=1.0)
    steps = train(
        policy, steps_of_groups(), lambda model, groups: align_loss(model, reference, groups, objective("exo_rw")), adam
    )
    return Expected(scores, steps, before, dict(policy.state_dict()), min(margins))


def _margin(logits: Tensor, chosen: int) -> float:
    """Smallest distance over all tokens between the last expert that is chosen and the first that is not."""
    ordered = logits.detach().sort(dim=-1, descending=True).values
    return (ordered[:, chosen - 1] - ordered[:, chosen]).min().item()


class Worlds:
    """Starts the group of each size when the first test asks for it, smaller ones first: they leave checkpoints."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.outcomes: dict[int, dict[str, Outcome]] = {}

    def values(self, kind: str, case: Case) -> tuple[Any, ...]:
        for size in (1, 2, 4):
            if size <= case.world_size and size not in self.outcomes:
                self.outcomes[size] = run_checks(size, self._checks(size), self.root / "workers")
        return self.outcomes[case.world_size][f"{kind} {case.name}"].values()

    def _checks(self, size: int) -> list[Check]:
        kinds = (
            ("train", self._training, [*CASES, ROUGH]),
            ("generate", self._generation, GENERATED),
        )
        return [
            Check(f"{kind} {case.name}", f"{HERE}:{kind}", arguments(case))
            for kind, arguments, cases in kinds
            for case in cases
            if case.world_size == size
        ]

    def _training(self, case: Case) -> dict[str, Any]:
        return {
            "weights": self.root / f"{case.model}.pt",
            "parallel": case.parallel,
            "compute": {
                "precision": case.precision,
                "recompute": case.recompute,
                "max_tokens_per_microbatch": case.max_tokens,
                "logits_memory_mib": 0,
            },
            "optimizer": {"lr": LR, "eps": 1e-4, "schedule": "constant"},
            "loss": vars(objective("exo_rw")),
            "steps": our_steps(case.model),
            "save": (1, self.root / case.name) if case.saves else None,
            "resume": (1, self.root / case.resumes) if case.resumes else None,
            "hf": self.root / "hf",
        }

    def _generation(self, case: Case) -> dict[str, Any]:
        shares = [PROMPTS, []] if case.data == 2 else [PROMPTS]
        return {
            "weights": self.root / f"{case.model}.pt",
            "parallel": case.parallel,
            "shares": shares,
            "sampling": SAMPLING,
            "eos_id": EOS_ID,
        }


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    root = tmp_path_factory.mktemp("experts")
    for name in ("mixtral", "qwen3_moe"):
        policy = models(name)[0]
        torch.save((policy.config, policy.state_dict()), root / f"{name}.pt")
    save_hf(models("mixtral")[1], root / "hf")
    worlds = Worlds(root)
    yield worlds
    if "PARITY_REPORT" in os.environ:  # run with -s
        print_margins(worlds)


def print_margins(worlds: Worlds) -> None:
    """How far from the tolerances the agreement is."""
    for case in CASES:
        reference, ranks = expected(case.model), worlds.values("train", case)
        steps = reference.steps[1 if case.resumes else 0 :]
        pairs = [pair for trained in ranks for pair in zip(trained.results, steps, strict=True)]
        loss = max(abs(ours.loss / theirs.loss - 1) for ours, theirs in pairs)
        norm = max(abs(ours.grad_norm / theirs.grad_norm - 1) for ours, theirs in pairs)
        theirs, after = whole(case.model, steps[0].gradients), whole(case.model, reference.after)
        found = [item for trained in ranks for item in errors(trained.gradients, theirs).items()]
        gradient = max(error / theirs[key].abs().max().item() for key, error in found)
        weight = max(error for trained in ranks for error in errors(trained.weights, after).values()) / LR
        print(f"{case.name}: loss {loss:.1e}, norm {norm:.1e}, gradients {gradient:.1e}, weights {weight:.1e} lr")


def by_name(case: Case) -> str:
    return case.name


def whole(name: ModelName, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return whole_tensors(state, spec_of(models(name)[0].config))


def errors(parts: Sequence[tuple[Place, Tensor]], theirs: dict[str, Tensor]) -> dict[str, float]:
    """By key, the largest difference of a rank's parts from the same parts of the whole tensors."""
    result: dict[str, float] = {}
    for (key, place), part in parts:
        difference = (part.float() - theirs[key][place].view(part.shape)).abs().max().item()
        result[key] = max(result.get(key, 0.0), difference)
    return result


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_no_token_is_near_a_change_of_experts(name: ModelName) -> None:
    assert expected(name).margin > SMALLEST_MARGIN


@pytest.mark.parametrize("case", SCORED, ids=by_name)
def test_logprobs(case: Case, worlds: Worlds) -> None:
    for trained in worlds.values("train", case):
        for ours, theirs in zip(trained.logprobs, expected(case.model).logprobs, strict=True):
            assert ours == pytest.approx(theirs.tolist(), abs=1e-4)


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_loss_and_gradient_norm(case: Case, worlds: Worlds) -> None:
    steps = expected(case.model).steps[1 if case.resumes else 0 :]
    for trained in worlds.values("train", case):
        assert len(trained.results) == len(steps)
        for ours, theirs in zip(trained.results, steps, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=LOSS_TOLERANCE)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=GRADIENT_TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_every_gradient(case: Case, worlds: Worlds) -> None:
    """Of the first step that the run does: after a resumption the second, whose weights Adam has moved."""
    theirs = whole(case.model, expected(case.model).steps[1 if case.resumes else 0].gradients)
    for trained in worlds.values("train", case):
        for key, error in errors(trained.gradients, theirs).items():
            assert error < GRADIENT_TOLERANCE * theirs[key].abs().max().item(), key


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_weights_after_three_steps(case: Case, worlds: Worlds) -> None:
    before, theirs = (whole(case.model, state) for state in (expected(case.model).before, expected(case.model).after))
    assert min((theirs[key] - before[key]).abs().max().item() for key in theirs) > LR
    found: set[str] = set()
    for trained in worlds.values("train", case):
        for key, error in errors(trained.weights, theirs).items():
            assert error < WEIGHT_TOLERANCE, f"{key}: off by {error / LR:.1e} lr"
            found.add(key)
    assert found == theirs.keys()


def test_bf16_follows_the_reference_roughly(worlds: Worlds) -> None:
    trained: Trained = worlds.values("train", ROUGH)[0]
    for ours, theirs in zip(trained.results, expected("mixtral").steps, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=0.15, abs=0.05)


@pytest.mark.parametrize("case", GENERATED[1:], ids=by_name)
def test_copies_that_share_experts_wait_for_each_other(case: Case, worlds: Worlds) -> None:
    """One copy generates for all prompts, the other for none; the result is that of one process alone."""
    (alone,) = worlds.values("generate", GENERATED[0])
    for groups in worlds.values("generate", case):
        if groups:
            assert [group.prompt_id for group in groups] == [name for name, _ in PROMPTS]
            for ours, wanted in zip(groups, alone, strict=True):
                assert [c.token_ids for c in ours.candidates] == [c.token_ids for c in wanted.candidates]
    busy = [bool(groups) for groups in worlds.values("generate", case)]
    assert sum(busy) == len(busy) // 2
