"""The example's claims on its own grammar, in a small version; they fail when the two losses are exchanged."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from frontier import figures, sweep, theorems
from frontier.bigram import BigramWorld
from frontier.findings import Lead, describe, effect_of_K, find_leads
from frontier.reviews import load_reviews
from frontier.sweep import METHODS, Run, World, finish_runs
from frontier.work import SMALL, prepare, reference_run
from quickstart.corpus import make_corpus

from exo_megatron import dpo_loss, exo_loss
from exo_megatron.errors import DataError
from exo_megatron.evaluation.equal_kl import Bounded
from exo_megatron.evaluation.estimates import PromptMeans

DIRECTORY = Path(__file__).parents[3] / "examples" / "frontier"
KEYS = {"experiment", "policy", "rank", "K", "method", "beta_pi", "beta_r", "seed", "reward", "kl"}
KEYS |= {"reward_stderr", "kl_stderr"}


@pytest.fixture(scope="module")
def world() -> BigramWorld:
    torch.set_num_threads(1)
    return BigramWorld.of(load_reviews(None), seed=0)


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sweep.LOSSES, "exo_rw", dpo_loss)
    monkeypatch.setitem(sweep.LOSSES, "dpo_rw", exo_loss)


def leads_at_32(world: World) -> list[Lead]:
    runs = [run for run in SMALL.bigram_runs() if run.K == 32]
    (reference,) = finish_runs(world, [reference_run(runs[0])])
    return find_leads(dict(zip(runs, finish_runs(world, runs), strict=True)), {"bigram": reference})


def exo_is_ahead(leads: list[Lead]) -> bool:
    """By more than four standard errors at every end point of DPO from KL 1.5 on, of which there are some."""
    errors = [lead.errors for lead in leads if lead.kl >= 1.5]
    return len(errors) > 1 and all(each is not None and each > 4 for each in errors)


def test_exo_is_ahead_where_the_policy_cannot_follow(world: BigramWorld) -> None:
    assert exo_is_ahead(leads_at_32(world))


@pytest.mark.usefixtures("swapped")
def test_exchanged_losses_are_found_out(world: BigramWorld) -> None:
    assert not exo_is_ahead(leads_at_32(world))


@pytest.fixture(scope="module")
def problem() -> theorems.Problem:
    return theorems.make_problem(seed=0)


def test_theorem_3_1(problem: theorems.Problem) -> None:
    for betas in theorems.BETAS:
        assert theorems.optimum_error(problem, *betas) < 1e-6
    # The reward without the reference is another optimum.
    wrong = theorems.Problem(problem.reference, problem.policy, problem.rewards + 0.1 * problem.reference)
    assert theorems.optimum_error(wrong, 0.5, 1.0) < 1e-6
    difference = theorems.optimum(wrong.reference, wrong.rewards, 0.5)
    assert (difference - theorems.optimum(problem.reference, problem.rewards, 0.5)).abs().max() > 0.1


def cosines_are_right(problem: theorems.Problem) -> bool:
    few, many = (theorems.cosines(problem, K, 0.5, 0.3) for K in (2, 512))
    return min(many.values()) > 0.98 and few["exo_rw"] > few["dpo_rw"] + 0.1


def test_theorems_3_2_and_3_3(problem: theorems.Problem) -> None:
    """With many candidates each loss has its exact gradient, with two EXO is nearer to its own."""
    assert cosines_are_right(problem)


@pytest.mark.usefixtures("swapped")
def test_exchanged_losses_have_other_gradients(problem: theorems.Problem) -> None:
    assert not cosines_are_right(problem)


def test_fifths_hold_a_fifth_each() -> None:
    reference = torch.randn(2, 3, 2000, generator=torch.Generator().manual_seed(0)).log_softmax(dim=-1)
    fifths = figures.likelihood_fifths(reference)
    for number in range(5):
        assert (reference.exp() * (fifths == number)).sum(dim=-1).numpy() == pytest.approx(0.2, abs=0.01)
    least, most = (reference[0, 0][fifths[0, 0] == number] for number in (0, 4))
    assert least.max() <= most.min()


def test_exo_chooses_one_mode_and_dpo_lies_between() -> None:
    paths = figures.mode_paths(16)
    ends = {key: path.values["between"][-1].mean() for key, path in paths.items()}
    assert ends["exo_rw", 32] < 0.02 < 0.1 < ends["dpo_rw", 32]
    for path in paths.values():
        total = sum(path.values[name] for name in ("better mode", "other mode", "between"))
        assert total == pytest.approx(np.ones_like(total), abs=1e-4)


def points(*pairs: tuple[float, float]) -> list[PromptMeans]:
    return [PromptMeans.of([reward] * 5, [kl] * 5) for reward, kl in pairs]


def run_of(method: str, beta_r: float, *, K: int = 4, lr: float = 0.1) -> Run:
    return Run("bigram", 4, K, method, 0.5, beta_r, lr, 10, 2, 0)


def test_leads_and_the_effect_of_K_by_hand() -> None:
    """DPO has 1.0 at KL 2; EXO, from 0 at the reference, 1.2 there with one learning rate and 0.6 with the other."""
    (reference,) = points((0.0, 0.0))
    exo, slow, dpo, more = points((2.4, 8.0), (0.9, 4.5), (1.0, 2.0), (3.0, 4.0))
    runs = {
        run_of("exo_rw", 1.0): exo,
        run_of("exo_rw", 1.0, lr=0.2): slow,
        run_of("dpo_rw", 1.0): dpo,
        run_of("exo_rw", 1.0, K=8): more,
    }
    (lead,) = find_leads(runs, {"bigram": reference})
    assert lead.lead is not None and lead.lead.value == pytest.approx(0.2)
    # A better learning rate of DPO: 3.0 at KL 8, so 1.5 at KL 2; the lead is over that.
    (better,) = points((3.0, 8.0))
    beaten, _ = find_leads({**runs, run_of("dpo_rw", 0.5, lr=0.2): better}, {"bigram": reference})
    assert beaten.lead is not None and beaten.lead.value == pytest.approx(-0.3)
    effects = {(each.setting.K, each.method): each for each in effect_of_K(runs, {"bigram": reference}, kl=1.0)}
    assert effects[4, "exo_rw"].reward.value == pytest.approx(2.4 / 8**0.5) and effects[4, "exo_rw"].change is None
    change = effects[8, "exo_rw"].change
    assert change is not None and change.value == pytest.approx(3 / 2 - 2.4 / 8**0.5)


def test_verdict_counts_intervals() -> None:
    leads = [
        Lead(run_of("dpo_rw", 1.0), 2.5, Bounded(0.5, 0.1, 0.3, 0.7)),
        Lead(run_of("dpo_rw", 0.5), 3.0, Bounded(-0.1, 0.1, -0.3, 0.1)),
        Lead(run_of("dpo_rw", 0.25), 3.5, None),
        Lead(run_of("dpo_rw", 4.0), 0.3, Bounded(-9.0, 0.1, -9.2, -8.8)),
    ]
    (line,) = describe(leads, from_kl=2.0)
    assert "at 2 end points" in line and "above at 1 and below at 0" in line
    assert "-0.10 to +0.50 (-1.0 to +5.0 standard errors)" in line


def test_small_version(tmp_path: Path) -> None:
    """All that the example leaves; a second call computes no run again; other texts are refused."""
    output = tmp_path / "out"
    command = ["bash", str(DIRECTORY / "run.sh"), "--small", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "EXO is above at 2 and below at 0" in done.stdout
    found = json.loads((output / "summary.json").read_text())
    assert len(found) == len(SMALL.bigram_runs()) and all(set(each) > KEYS for each in found)
    assert {each["method"] for each in found} == set(METHODS) and {each["policy"] for each in found} == {"bigram"}
    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    times = {file: file.stat().st_mtime_ns for file in (output / "runs").iterdir()}
    assert len(times) == len(found) + 1
    texts = tmp_path / "texts.jsonl"
    others = [{"text": review.text, "label": review.label} for review in make_corpus(2000, seed=9)]
    texts.write_text("".join(json.dumps(each) + "\n" for each in others))
    with pytest.raises(DataError, match="has results from other texts"):
        prepare(output, texts)
    assert prepare(output, None).source == "the quickstart's grammar"
    assert times == {file: file.stat().st_mtime_ns for file in (output / "runs").iterdir()}


def test_too_few_texts_are_told(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": f"a good film number {i} .", "label": i % 2}) + "\n" for i in range(9))
    )
    with pytest.raises(DataError, match=r"texts\.jsonl: has 9 texts of more than 5 words, whose .* begin in 1 ways"):
        load_reviews(texts)
