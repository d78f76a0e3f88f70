"""The simulated schedule against cases worked out by hand, and the benchmark on top of it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from exo_megatron.data.groups import Group
from tools.bench import balance
from tools.bench.balance import COPIES, Model, ideal, random_plan, step_time
from tools.bench.lengths import HH, TLDR
from tools.bench.options import Options
from tools.bench.schedule import Durations, makespan
from tools.bench.sides import Different

QUICK = Options(quick=True, rounds=2, pictures=Path("unused"))


def even(stages: int, forward: float, backward: float) -> Durations:
    return Durations((forward,) * stages, (backward,) * stages)


@pytest.mark.parametrize(("stages", "count"), [(1, 1), (1, 5), (2, 1), (4, 2), (4, 8), (3, 12)])
def test_equal_microbatches_cost_a_bubble_of_stages_minus_one(stages: int, count: int) -> None:
    assert makespan([even(stages, 3.0, 5.0)] * count) == (count + stages - 1) * 8.0


@pytest.mark.parametrize("index", range(6))
def test_on_one_stage_durations_add_up(index: int) -> None:
    batches = [even(1, 1.0, 2.0)] * 6
    batches[index] = even(1, 7.0, 20.0)
    assert makespan(batches) == 5 * 3.0 + 27.0


def test_one_slow_microbatch_on_two_stages() -> None:
    """Micro-batches of F=1, B=2, the middle one of three twice as slow, drawn by hand:

        time     0 1 2 3 4 5 6 7 8 9 10 11 12 13
        stage 0  f0 F1 F1  . .  b0 b0 f2 B1 ...
        stage 1     f0 b0 b0 F1 F1 B1 B1 B1 B1 f2 b2 b2

    Stage 1: f0 1-2, b0 2-4, F1 4-6 (its input is ready at 3), B1 6-10, f2 10-11, b2 11-13.
    Stage 0: f0 0-1, F1 1-3, b0 4-6, f2 6-7, B1 10-14, b2 14-16.
    """
    assert makespan([even(2, 1.0, 2.0), even(2, 2.0, 4.0), even(2, 1.0, 2.0)]) == 16.0


def test_a_slow_microbatch_of_one_stage_holds_up_the_others() -> None:
    """Stage 1: f0 1-2, b0 2-3, f1 3-13, b1 13-14. Stage 0: f0 0-1, f1 1-2, b0 3-4, b1 14-15."""
    assert makespan([even(2, 1.0, 1.0), Durations((1.0, 10.0), (1.0, 1.0))]) == 15.0


def test_slower_last_stage_is_what_every_microbatch_waits_for() -> None:
    """Stage 1 works without a pause from 1 to 1 + 4 * 5; then stage 0 does the last backward pass."""
    assert makespan([Durations((1.0, 2.0), (2.0, 3.0))] * 4) == 1.0 + 4 * 5.0 + 2.0


def test_cost_of_a_microbatch_by_hand() -> None:
    model = Model(hidden=2, layers=4, ffn=3, vocab=5)
    # 7 tokens, 2 * (4 * 4 + 3 * 2 * 3) = 68 FLOPs each; pairs 4.5 + (3 * 3 + 4.5) + (3 + 0.5) = 21.5 at 8 FLOPs;
    # one layer a stage; predicting positions: the prompt's last and two of candidate 0.
    durations = model.durations([Group("g", (1, 1, 1), ((1, 1, 1), (1,)))])
    layer, head = 7 * 68 + 21.5 * 8, 2 * 2 * 5 * 3
    assert durations.forward == (layer, layer, layer, layer + head)
    assert durations.backward == (2 * layer, 2 * layer, 2 * layer, 2 * layer + 3 * head)


def test_equal_groups_in_equal_numbers_are_ideal() -> None:
    groups = [Group(str(i), (1,) * 50, ((1,) * 20, (1,) * 30)) for i in range(2 * COPIES * 3)]
    plan = [[[copy * 6 + 2 * row, copy * 6 + 2 * row + 1] for row in range(3)] for copy in range(COPIES)]
    assert step_time(Model(), plan, groups) == pytest.approx(ideal(Model(), plan, groups), rel=1e-12)


def test_the_slowest_copy_decides() -> None:
    groups = [Group(str(i), (1,) * 50, ((1,) * 20,)) for i in range(COPIES + 1)]
    plan = [[[copy]] for copy in range(COPIES)]
    plan[2][0].append(COPIES)
    alone = step_time(Model(), [[[0, 1]], [[]], [[]], [[]]], groups[:2])
    assert step_time(Model(), plan, groups) == alone


def test_packed_steps_reach_the_target_and_random_ones_do_not() -> None:
    table = balance.run(QUICK)
    found = {(row[0], row[1]): (float(row[5]), float(row[6])) for row in table.rows}
    assert found.keys() == {(lengths.name, k) for lengths in (HH, TLDR) for k in ("2", "4", "8")}
    for shuffled, ours in found.values():
        assert ours < balance.TARGET < shuffled


def test_a_plan_that_loses_a_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = balance.plan_microbatches

    def losing(*args: object, **kwargs: object) -> balance.Plan:
        found = plan(*args, **kwargs)
        found[0][0] = found[0][0][:-1]
        return found

    monkeypatch.setattr(balance, "plan_microbatches", losing)
    with pytest.raises(Different, match="of 63 groups"):
        balance.run(QUICK)


def test_random_plan_deals_equal_numbers() -> None:
    plan = random_plan(70, 8, random.Random(0))
    assert [len(copy) for copy in plan] == [8] * COPIES
    assert {len(row) for copy in plan for row in copy} == {2, 3}
    assert sorted(i for copy in plan for row in copy for i in row) == list(range(70))
