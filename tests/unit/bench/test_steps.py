"""Small versions of the benchmarks of training steps: both sides run, and a wrong gradient is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from exo_megatron.data.groups import Group
from exo_megatron.data.packing import MicroBatch, make_microbatch
from exo_megatron.diagnosis.likelihood import unshared
from exo_megatron.diagnosis.work import Lengths
from exo_megatron.execution import forward
from exo_megatron.training import step
from tools.bench import rollout
from tools.bench.compare import Finding, compare, read_committed
from tools.bench.lengths import HH, TLDR
from tools.bench.models import Shape, matched_models, random_groups, world
from tools.bench.sharing import formula
from tools.bench.steps import COMPUTE, QUICK_CELLS, QUICK_SHAPE, REWARDS, count_work, our_steps
from tools.bench.table import Record
from tools.bench.training import OurSteps
from tools.bench.work import PLAIN, STORED, waterfall

REPOSITORY = Path(__file__).resolve().parents[3]
COMMITTED = REPOSITORY / "docs" / "benchmarks" / "cpu-2-cores-quick.json"
WRONG_GRADIENT = """
import sys
from tools.bench import training
from tools.bench.__main__ import main
right = training.hf_gradients
def wrong(trainee, matched):
    gradients = right(trainee, matched)
    name = sorted(gradients)[len(gradients) // 2]
    return {**gradients, name: gradients[name] * 1.001}
training.hf_gradients = wrong
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments: str, program: tuple[str, ...] = ("-m", "tools.bench")) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because a benchmark joins a world and prepares megatron-core for the CPU."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(REPOSITORY),
        "THP_MEM_ALLOC_ENABLE": "0",  # as the committed figures were taken
    }
    command = [sys.executable, *program, *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_small_versions_run_and_are_as_good_as_the_committed_figures(tmp_path: Path) -> None:
    names = ["steps", "rollout", "sharing", "peak"]
    files = ["--json", str(tmp_path / "tables.json"), "--pictures", str(tmp_path), "--compare", str(COMMITTED)]
    done = run(*names, "--quick", *files)
    assert done.returncode == 0, done.stderr[-2000:]
    tables = json.loads((tmp_path / "tables.json").read_text())
    assert list(tables) == names
    assert [len(table["rows"]) for table in tables.values()] == [9 + 7, 2, 2, 2]
    assert all(0 < float(row["gradient difference"]) < 1e-4 for row in tables["sharing"]["rows"])
    rollouts = tables["rollout"]["rows"]
    assert [(row["P, R, K"], row["prompts"]) for row in rollouts] == [("12, 6, 4", "6"), ("5, 9, 2", "8")]
    assert all(0 < float(row["log-prob difference"]) < rollout.TOLERANCE for row in rollouts)
    assert (tmp_path / "quick-steps.png").read_bytes().startswith(b"\x89PNG")
    assert tables["steps"]["records"].keys() == {"HH-like, K=2", "TL;DR-like, K=8"}


def test_wrong_gradient_is_found_before_any_time_is_printed() -> None:
    done = run("steps", "--quick", program=("-c", WRONG_GRADIENT))
    assert done.returncode == 1
    assert "steps: the sides do not compute the same: relative difference 1.0e-03" in done.stderr
    assert "|" not in done.stdout


def test_unknown_name_and_file_without_records_are_told(tmp_path: Path) -> None:
    done = run("stpes")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'stpes'" in done.stderr
    done = run("steps", "--compare", str(tmp_path / "none.json"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "none.json has no records of steps" in done.stderr


@pytest.fixture(scope="module")
def count() -> Callable[[], Record]:
    """Return a function that counts our steps of the quick TL;DR-like case, as the benchmark does."""
    (lengths, candidates, groups) = QUICK_CELLS[1]

    def counted() -> Record:
        with world() as runtime, matched_models(QUICK_SHAPE, runtime, COMPUTE) as matched:
            ours = OurSteps.of(matched, REWARDS)
            drawn = random_groups(lengths.spread(groups, candidates), QUICK_SHAPE.vocab)
            found = count_work(ours, our_steps(ours, drawn, ours.stored(drawn)))
        counts = {f"{name}: {what}": n for name, each in found.items() for what, n in each.items()}
        return Record("TL;DR-like, K=8", counts, {})

    return counted


def findings(record: Record) -> list[Finding]:
    old = next(each for each in read_committed(COMMITTED, ["steps"])["steps"] if each.case == record.case)
    return compare([record], [replace(old, ratios={})])


def test_counts_are_the_committed_ones_and_those_of_the_formula(count: Callable[[], Record]) -> None:
    record = count()
    assert findings(record) == []
    lengths, candidates, groups = QUICK_CELLS[1]
    for rung in waterfall(lengths.spread(groups, candidates)):
        passes = 2 if rung.live else 1
        assert record.counts[f"{rung.name}: tokens"] == passes * rung.work.tokens
        assert record.counts[f"{rung.name}: projected"] == passes * rung.work.projected
        # Kernels count whole rectangles of queries and keys, and five products backward instead of four.
        assert rung.flops(QUICK_SHAPE.size) < record.counts[f"{rung.name}: flops"]
        assert record.counts[f"{rung.name}: flops"] < 1.4 * rung.flops(QUICK_SHAPE.size)


def repeated_prompt(groups: Sequence[Group], *, multiple: int) -> MicroBatch:
    """Lay out every candidate with a prompt of its own."""
    whole, alone = make_microbatch(groups, multiple=multiple), make_microbatch(unshared(groups), multiple=multiple)
    return replace(whole, layout=replace(alone.layout, group_sizes=whole.layout.group_sizes))


def padded(groups: Sequence[Group], *, multiple: int) -> MicroBatch:
    """Pad the micro-batch by one token at least."""
    return make_microbatch(groups, multiple=max(2, 1 + sum(group.num_tokens for group in groups)))


@pytest.mark.parametrize("sabotage", [repeated_prompt, padded])
def test_repeated_prompt_and_padding_are_found(
    sabotage: Callable[..., MicroBatch], count: Callable[[], Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (step, forward):
        monkeypatch.setattr(module, "make_microbatch", sabotage)
    found = findings(count())
    assert found
    assert all(finding.fails for finding in found)
    assert any(f"{STORED}: tokens is" in finding.message for finding in found)
    assert not any(f": {PLAIN}" in finding.message for finding in found)  # that one does not come from there


def test_ratios_fail_and_warn_below_the_committed_ones() -> None:
    committed = [Record("case", {"tokens": 10}, {"TRL / ours": 2.0})]

    def found(ratio: float) -> list[bool]:
        return [each.fails for each in compare([Record("case", {"tokens": 10}, {"TRL / ours": ratio})], committed)]

    assert found(2.5) == found(1.81) == []
    assert found(1.79) == found(1.51) == [False]
    assert found(1.49) == [True]
    assert [each.fails for each in compare([], committed)] == [True]
    assert [each.message for each in compare([Record("case", {"tokens": 11}, {"TRL / ours": 2.0})], committed)] == [
        "case: tokens is 11, committed 10"
    ]


def test_formula_of_sharing_by_hand() -> None:
    # One layer, H = 4, ffn 64: 4 * 16 + 3 * 4 * 64 = 832 weights, 1664 FLOPs a token, 16 FLOPs a pair.
    shape = Shape(hidden=4, layers=1, vocab=10, head_dim=4)
    assert shape.size.linear == 832
    # P = 3, R = 2, K = 2. Separate: 2 sequences of 5. Shared: 3 + 4 tokens; pairs 4.5 + 2 * (6 + 2).
    assert formula(shape, 3, 2, 2) == pytest.approx((1664 * 10 + 16 * 25) / (1664 * 7 + 16 * 20.5))


def test_formula_of_sharing_is_that_of_the_facts_for_a_7b_model() -> None:
    shape = Shape(hidden=4096, layers=32, vocab=32_000)
    ideal = {(47, 230, 4): 1.14, (400, 50, 4): 2.98, (400, 50, 8): 4.45, (512, 512, 4): 1.58, (1024, 128, 8): 4.43}
    for (prompt, length, candidates), speedup in ideal.items():
        assert formula(shape, prompt, length, candidates) == pytest.approx(speedup, rel=0.012)


def test_length_lists_are_what_the_documentation_says() -> None:
    for lengths, prompt, candidate in ((HH, 47, 230), (TLDR, 400, 50)):
        drawn = lengths.draw(4000, 2)
        assert drawn[:5] == lengths.draw(4000, 2)[:5]
        assert sum(each.prompt for each in drawn) / 4000 == pytest.approx(prompt, rel=0.06)
        assert sum(sum(each.candidates) for each in drawn) / 8000 == pytest.approx(candidate, rel=0.06)
        assert max(each.prompt for each in drawn) <= 512
        assert isinstance(drawn[0], Lengths)


def test_few_spread_lengths_have_the_means_of_their_kind() -> None:
    for lengths, prompt, candidate in ((HH, 47, 230), (TLDR, 400, 50)):
        for groups, candidates in ((1, 8), (4, 2), (2, 32)):
            given = lengths.spread(groups, candidates)
            assert given == lengths.spread(groups, candidates)
            assert sum(each.prompt for each in given) / groups == pytest.approx(prompt, abs=1)
            answers = [length for each in given for length in each.candidates]
            assert sum(answers) / len(answers) == pytest.approx(candidate, abs=1)
            assert max(answers) <= 512
            assert min(answers) < 0.8 * candidate
