"""`align` and `sft` against plain PyTorch on HF models: loss, every gradient, weights after three optimizer steps.

The reference (tests/reference) runs every prompt + candidate as a sequence of its own, without packing, parallelism or
megatron-core. Tolerances: 1e-5 of the loss, 1e-4 of each gradient tensor's largest entry.

Weights after Adam: a step moves a weight by lr * m / (sqrt(v) + eps), about lr * g / (|g| + eps) in the first steps.
Where a gradient is far below eps the move is proportional to it, where it is far above the move is lr; in between
an absolute error d of the gradient becomes at most an error of lr * d / eps of the weight. With the usual eps = 1e-8
the rounding of entries that are zero up to cancellation (d about 1e-8 after clipping) would become errors of lr.
With eps = 1e-4 they stay below 1e-3 * lr, while most entries (1e-4 to 1e-1) still get Adam's normalised step.
Without clipping gradients are about ten times larger, and so is eps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from exo_megatron.data.groups import StepSampler
from exo_megatron.losses.objective import NLL, STATISTICS
from tests.multiprocess.align_case import (
    CASES,
    EXPORTED,
    MAX_TOKENS,
    OVERSIZED,
    ROUGH_CASES,
    SEED,
    STEPS,
    Case,
    demonstrations,
    objective,
    preference_groups,
    reward_groups,
    write_records,
)
from tests.multiprocess.align_checks import RankRecord
from tests.multiprocess.harness import Check, Outcome, run_checks
from tests.reference.hf_names import to_hf
from tests.reference.objective import LossKind, ReferenceGroup, align_loss, sft_loss
from tests.reference.tiny_llama import save_hf, tiny_config, tiny_llama
from tests.reference.training import Adam, StepResult, train, warmup_linear_rates
from tests.reference.weights import perturbed

LR, WARMUP, MIN_RATIO = 2e-3, 1, 0.1
LOSS_TOLERANCE, GRADIENT_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4, 2e-3 * LR


@dataclass(frozen=True)
class Expected:
    """The reference's steps, and its weights before and after them."""

    steps: list[StepResult]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def models(*, tied: bool) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """Policy, and a reference that differs from it, so that no log-ratio is zero at the first step."""
    reference = tiny_llama(tiny_config(tied=tied), seed=11)
    return perturbed(reference, seed=12, scale=0.1), reference


def data(kind: str) -> list[ReferenceGroup]:
    if kind == "sft":
        return demonstrations()
    return preference_groups() if kind.endswith("pref") else reward_groups()


def steps_of(groups: Sequence[ReferenceGroup], groups_per_step: int) -> list[list[ReferenceGroup]]:
    """The groups of each step: which they are is the sampler's business, what to do with them is not."""
    sampler = StepSampler(len(groups), groups_per_step=groups_per_step, epochs=2, max_steps=STEPS, seed=SEED)
    return [[groups[i] for i in sampler.indices(step)] for step in range(STEPS)]


def expected_for(case: Case) -> Expected:
    """Of everything that distinguishes cases, only this decides the result."""
    return expected(case.kind, case.nll_weight, case.tied, case.weight_decay, case.clip_grad, case.groups_per_step)


@cache
def expected(
    kind: LossKind | Literal["sft"],
    nll_weight: float,
    tied: bool,
    weight_decay: float,
    clip_grad: float,
    groups_per_step: int,
) -> Expected:
    policy, reference = models(tied=tied)
    chosen = objective("exo_rw" if kind == "sft" else kind, nll_weight)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    adam = Adam(
        warmup_linear_rates(LR, steps=STEPS, warmup=WARMUP, min_ratio=MIN_RATIO),
        beta1=0.9,
        beta2=0.95,
        eps=eps_for(clip_grad),
        clip_grad=clip_grad,
        weight_decay=weight_decay,
    )

    def batch_loss(model: LlamaForCausalLM, groups: Sequence[ReferenceGroup]) -> Tensor:
        return sft_loss(model, groups) if kind == "sft" else align_loss(model, reference, groups, chosen)

    steps = train(policy, steps_of(data(kind), groups_per_step), batch_loss, adam)
    return Expected(steps, before, {name: p.detach().clone() for name, p in policy.named_parameters()})


def eps_for(clip_grad: float) -> float:
    return 1e-4 if clip_grad else 1e-3


def stage_config(case: Case, root: Path) -> dict[str, Any]:
    """The settings of one run, as a user would write them."""
    embeddings = "tied" if case.tied else "untied"
    settings: dict[str, Any] = {
        "output": root / "runs" / case.name,
        "seed": SEED,
        "model": {"checkpoint": root / f"policy-{embeddings}"},
        "data": {"path": str(root / data_file(case.kind))},
        "parallel": {"tensor": case.tensor, "pipeline": case.pipeline, "sequence": case.sequence},
        "compute": {
            "precision": case.precision,
            "recompute": case.recompute,
            "max_tokens_per_microbatch": case.max_tokens,
            "logits_memory_mib": 0,
        },
        "optimizer": {
            "lr": LR,
            "eps": eps_for(case.clip_grad),
            "clip_grad": case.clip_grad,
            "weight_decay": case.weight_decay,
            "schedule": "linear",
            "warmup_steps": WARMUP,
            "min_lr_ratio": MIN_RATIO,
        },
        "batch": {"groups": case.groups_per_step, "epochs": 2, "max_steps": STEPS},
        "log": {"tensorboard": False},
    }
    if case.kind != "sft":
        settings |= {
            "reference": {"checkpoint": root / f"reference-{embeddings}"},
            "reference_logprobs": case.reference,
            "loss": vars(objective(case.kind, case.nll_weight)),
        }
    return settings


def data_file(kind: str) -> str:
    if kind == "sft":
        return "demonstrations.jsonl"
    return "preference.jsonl" if kind.endswith("pref") else "rewards.jsonl"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("align")
    write_inputs(directory)
    return directory


def write_inputs(directory: Path) -> None:
    """HF checkpoints and data files."""
    for tied in (False, True):
        for name, model in zip(("policy", "reference"), models(tied=tied), strict=True):
            save_hf(model, directory / f"hf-{name}-{'tied' if tied else 'untied'}")
    write_records(directory / "rewards.jsonl", reward_groups(), fields="rewards")
    write_records(directory / "preference.jsonl", preference_groups(), fields="pair")
    write_records(directory / "demonstrations.jsonl", demonstrations(), fields="chosen")


class Worlds:
    """Starts the group of each size when the first test asks for it; smaller ones first, they import the models."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.outcomes: dict[int, dict[str, Outcome]] = {}

    def records(self, case: Case) -> tuple[RankRecord, ...]:
        return self.outcome(case.world_size, case.name).values()

    def outcome(self, world_size: int, name: str) -> Outcome:
        for size in (1, 2, 4):
            if size <= world_size and size not in self.outcomes:
                self.outcomes[size] = run_checks(size, self._checks(size), self.root / "workers")
        return self.outcomes[world_size][name]

    def _checks(self, size: int) -> list[Check]:
        here = "tests.multiprocess.align_checks"
        checks = []
        if size == 1:
            for name in ("policy-untied", "policy-tied", "reference-untied", "reference-tied"):
                arguments = {"hf": self.root / f"hf-{name}", "output": self.root / name}
                checks.append(Check(f"import-{name}", f"{here}:import_checkpoint", arguments))
        for case in CASES + ROUGH_CASES:
            if case.world_size == size:
                config = stage_config(case, self.root)
                stage = "sft" if case.kind == "sft" else "align"
                checks.append(Check(case.name, f"{here}:{stage}", {"config": config}))
                if case in EXPORTED:
                    arguments = {"checkpoint": config["output"], "output": self.root / f"exported-{case.name}"}
                    checks.append(Check(f"export-{case.name}", f"{here}:export_checkpoint", arguments))
        return checks


@pytest.fixture(scope="module")
def worlds(root: Path) -> Iterator[Worlds]:
    worlds = Worlds(root)
    yield worlds
    if "PARITY_REPORT" in os.environ:  # run with -s; for docs/numerics.md
        print_margins(worlds)


def print_margins(worlds: Worlds) -> None:
    """How far from the tolerances the agreement is."""
    for case in CASES:
        errors = margins(case, worlds.records(case))
        print(f"{case.name}: " + ", ".join(f"{what} {error:.1e}" for what, error in errors.items()))


def margins(case: Case, records: Sequence[RankRecord]) -> dict[str, float]:
    """The largest relative error of a step's loss and of the first gradients, and that of the last weights in steps."""
    reference = expected_for(case)
    loss = max(abs(a["loss"] / b.loss - 1) for a, b in zip(records[0].metrics, reference.steps, strict=True))
    ours = in_hf_names(records, case, lambda record: record.gradients[0])
    theirs = reference_names(case, reference.steps[0].gradients)
    gradient = max(relative_error(ours[name], theirs[name]) for name in theirs)
    ours = in_hf_names(records, case, lambda record: record.weights)
    theirs = reference_names(case, reference.after)
    weight = max((ours[name] - theirs[name]).abs().max().item() for name in theirs) / LR
    return {"loss": loss, "gradients": gradient, "weights in steps": weight}


def in_hf_names(records: Sequence[RankRecord], case: Case, tensors_of: Any, *, data_rank: int = 0) -> dict[str, Tensor]:
    """Whole tensors by HF name. With tied embeddings the last stage's own copy is called lm_head.weight."""
    config = tiny_config(tied=case.tied)
    result: dict[str, Tensor] = {}
    for stage in range(case.pipeline):
        ranks = [r for r in records if r.pipeline_rank == stage and r.data_rank == data_rank]
        ranks.sort(key=lambda record: record.tensor_rank)
        result |= to_hf([tensors_of(record) for record in ranks], config)
    return result


def reference_names(case: Case, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's tensors under the names of `in_hf_names`."""
    if case.tied and case.pipeline > 1:
        return theirs | {"lm_head.weight": theirs["model.embed_tokens.weight"]}
    return theirs


def by_name(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_loss_of_every_step(case: Case, worlds: Worlds) -> None:
    steps = expected_for(case).steps
    for record in worlds.records(case):
        assert [line["step"] for line in record.metrics] == list(range(1, STEPS + 1))
        for line, step in zip(record.metrics, steps, strict=True):
            assert line["loss"] == pytest.approx(step.loss, rel=LOSS_TOLERANCE)
            assert line["grad_norm"] == pytest.approx(step.grad_norm, rel=GRADIENT_TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_every_gradient(case: Case, worlds: Worlds) -> None:
    records = worlds.records(case)
    theirs = reference_names(case, expected_for(case).steps[0].gradients)
    ours = in_hf_names(records, case, lambda record: record.gradients[0])
    assert ours.keys() == theirs.keys()
    errors = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < GRADIENT_TOLERANCE, f"{worst}: {errors[worst]:.2e}"


@pytest.mark.parametrize("case", OVERSIZED, ids=by_name)
def test_oversized_groups_are_counted(case: Case, worlds: Worlds) -> None:
    multiple = case.tensor if case.sequence else 1
    capacity = case.max_tokens // multiple * multiple
    steps = steps_of(data(case.kind), case.groups_per_step)
    sizes = [[len(g.prompt) + sum(map(len, g.candidates)) for g in groups] for groups in steps]
    expected = [sum(size > capacity for size in step) for step in sizes]
    assert sum(expected) > 0
    for record in worlds.records(case):
        assert [line["oversized_groups"] for line in record.metrics] == expected


@pytest.mark.parametrize("case", [c for c in OVERSIZED if replace(c, max_tokens=MAX_TOKENS) in CASES], ids=by_name)
def test_a_group_in_parts_is_the_group_in_one_micro_batch(case: Case, worlds: Worlds) -> None:
    """Loss, every statistic and every gradient of the first step."""
    split, unsplit = worlds.records(case), worlds.records(replace(case, max_tokens=MAX_TOKENS))
    ours, theirs = split[0].metrics[0], unsplit[0].metrics[0]
    assert ours.keys() == theirs.keys()
    for name in {"loss", "grad_norm", *STATISTICS} | ({NLL} if case.nll_weight else set()):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
    for mine, other in zip(split, unsplit, strict=True):
        for name, gradient in (other.gradients or [{}])[0].items():
            assert relative_error(mine.gradients[0][name], gradient) < 1e-5, name


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest entry."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_weights_after_three_steps(case: Case, worlds: Worlds) -> None:
    records = worlds.records(case)
    reference = expected_for(case)
    theirs = reference_names(case, reference.after)
    moved = [(reference.after[name] - reference.before[name]).abs().max().item() for name in reference.after]
    assert min(moved) > LR  # every tensor went further than one full step, so agreement means something
    for data_rank in range(case.data):
        ours = in_hf_names(records, case, lambda record: record.weights, data_rank=data_rank)
        assert ours.keys() == theirs.keys()
        errors = {name: (ours[name] - theirs[name]).abs().max().item() for name in theirs}
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] < WEIGHT_TOLERANCE, f"{worst}: off by {errors[worst] / LR:.2e} lr"


@pytest.mark.parametrize("case", EXPORTED, ids=by_name)
def test_exported_checkpoint_holds_the_same_weights(case: Case, worlds: Worlds) -> None:
    """What the run left on disk, converted to HF, is what it had in memory, bit for bit."""
    worlds.outcome(case.world_size, f"export-{case.name}").values()
    exported = load_file(worlds.root / f"exported-{case.name}" / "model.safetensors")
    ours = in_hf_names(worlds.records(case), case, lambda record: record.weights)
    if case.tied:
        assert torch.equal(ours.pop("lm_head.weight"), ours["model.embed_tokens.weight"])
    assert exported.keys() == ours.keys()
    assert all(torch.equal(exported[name], ours[name]) for name in ours)


def test_packing_is_as_the_issue_asks(worlds: Worlds) -> None:
    """The runs above do hold groups of different K, several groups per micro-batch, micro-batches with different
    numbers of groups, several micro-batches per rank, and ranks without a group.
    """
    records = worlds.records(Case(2, 1, 2))
    assert {k for record in records for step in record.groups for batch in step for k in batch} == {2, 3, 4, 5}
    first_step = [batch for record in records if record.tensor_rank == 0 for batch in record.groups[0]]
    assert sorted(len(batch) for batch in first_step) == [1, 1, 1, 2]
    assert all(len(record.groups[0]) == 2 for record in records)
    single = worlds.records(Case(1, 1, 1))[0].groups
    assert [sum(len(batch) for batch in step) for step in single] == [5, 4, 5]
    idle = worlds.records(Case(1, 2, 2, groups_per_step=1))
    assert any(step == [()] for record in idle for step in record.groups)


def test_stored_and_live_reference_agree(worlds: Worlds) -> None:
    """The same topology and data; only weight decay and recomputation differ, which the first step's loss ignores."""
    stored = worlds.records(Case(2, 1, 2))[0].metrics[0]
    live = worlds.records(Case(2, 1, 2, reference="live", weight_decay=0.1))[0].metrics[0]
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "exo/kl"):
        # Not bit for bit: stored log-probs come from micro-batches packed otherwise, sums near -30 in fp32.
        assert live[name] == pytest.approx(stored[name], rel=2e-6, abs=5e-6), name


def test_metrics_do_not_depend_on_the_topology(worlds: Worlds) -> None:
    one = worlds.records(Case(1, 1, 1))[0].metrics
    untimed = {"tokens_per_second"}
    for case in (Case(2, 1, 1, recompute="selective"), Case(1, 1, 2), Case(2, 2, 1), Case(2, 1, 2)):
        for line, wanted in zip(worlds.records(case)[0].metrics, one, strict=True):
            assert line.keys() == wanted.keys()
            for name in line.keys() - untimed:
                assert line[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name


def test_learning_rates(worlds: Worlds) -> None:
    rates = warmup_linear_rates(LR, steps=STEPS, warmup=WARMUP, min_ratio=MIN_RATIO)
    lines = worlds.records(Case(1, 1, 1))[0].metrics
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates, rel=1e-12)


@pytest.mark.parametrize("case", ROUGH_CASES, ids=by_name)
def test_bf16_follows_the_reference_roughly(case: Case, worlds: Worlds) -> None:
    follows_roughly(case, worlds.records(case))


def follows_roughly(case: Case, records: Sequence[RankRecord]) -> None:
    """bf16 keeps 8 bits: log-probs of sums near -30 are off by tenths, so loss and gradient are close, not equal."""
    reference = expected_for(case)
    for line, step in zip(records[0].metrics, reference.steps, strict=True):
        assert line["loss"] == pytest.approx(step.loss, rel=0.1, abs=0.02)
    ours = in_hf_names(records, case, lambda record: record.gradients[0])
    for name, theirs in reference_names(case, reference.steps[0].gradients).items():
        alike = torch.cosine_similarity(ours[name].float().flatten(), theirs.flatten(), dim=0).item()
        assert alike > 0.98, f"{name}: cosine {alike:.4f}"
