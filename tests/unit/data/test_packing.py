"""The plan of micro-batches: what it must never break, and how well it balances."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from exo_megatron.data.groups import Group
from exo_megatron.data.packing import group_cost, make_microbatch, plan_microbatches

Plan = list[list[list[int]]]


def group(name: object, prompt: int, *lengths: int) -> Group:
    return Group(str(name), (1,) * prompt, tuple((2,) * length for length in lengths))


def random_group(rng: random.Random, name: int, longest: int) -> Group:
    """Log-normal lengths, as real prompts and candidates have."""

    def length(most: int) -> int:
        return max(1, min(most, int(rng.lognormvariate(3.5, 0.9))))

    count = rng.randint(1, 5)
    return group(name, length(longest // 3), *(length(longest // (2 * count)) for _ in range(count)))


def check(plan: Plan, groups: list[Group], *, data_size: int, max_tokens: int, multiple: int) -> None:
    assert len(plan) == data_size
    assert len({len(batches) for batches in plan}) == 1
    assert sorted(i for batches in plan for batch in batches for i in batch) == list(range(len(groups)))
    for batch in itertools.chain(*plan):
        assert batch == sorted(batch)
        tokens = sum(groups[i].num_tokens for i in batch)
        assert -(-tokens // multiple) * multiple <= max_tokens


@pytest.mark.parametrize("seed", range(60))
def test_every_plan_is_whole_fits_and_repeats(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {
        "data_size": rng.choice([1, 2, 3, 8]),
        "max_tokens": rng.choice([128, 200, 511, 2048]),
        "multiple": rng.choice([1, 2, 8]),
    }
    groups = [random_group(rng, i, sizes["max_tokens"] // 8 * 8) for i in range(rng.choice([1, 2, 5, 17, 64]))]
    plan = plan_microbatches(groups, **sizes)
    check(plan, groups, **sizes)
    assert plan == plan_microbatches(groups, **sizes)
    capacity = sizes["max_tokens"] // sizes["multiple"] * sizes["multiple"]
    fewest = -(-sum(g.num_tokens for g in groups) // (capacity * sizes["data_size"]))
    # Best-fit decreasing needs at most 11/9 of the optimal bins and one more; ranks round up.
    assert fewest <= len(plan[0]) <= fewest * 2 + 1


@pytest.mark.parametrize(("count", "data_size"), [(64, 1), (64, 2), (128, 4), (512, 8)])
def test_costs_of_micro_batches_are_within_a_few_percent(count: int, data_size: int) -> None:
    rng = random.Random(count)
    groups = [random_group(rng, i, 600) for i in range(count)]
    plan = plan_microbatches(groups, data_size=data_size, max_tokens=2048, multiple=1)
    costs = [sum(group_cost(groups[i]) for i in batch) for batches in plan for batch in batches]
    assert len(costs) > 1
    assert max(costs) < 1.04 * sum(costs) / len(costs)


def test_differencing_balances_better_than_longest_first() -> None:
    """Karmarkar and Karp's own example, 8 7 6 5 4: longest-first gives 17 and 13, differencing 16 and 14."""
    groups = [group(n, length - 1, 1) for n, length in enumerate([8, 7, 6, 5, 4])]
    plan = plan_microbatches(groups, data_size=2, max_tokens=100, multiple=1, hidden_size=10**9)
    assert sorted(sum(groups[i].num_tokens for i in batch) for batches in plan for batch in batches) == [14, 16]


def test_cost_decides_where_lengths_are_equal() -> None:
    """For a narrow model a long prompt costs much more than its tokens, so the two long ones are parted."""
    groups = [group(n, 390, 10) for n in range(2)] + [group(n, 1, *[3] * 133) for n in range(2, 4)]
    plan = plan_microbatches(groups, data_size=2, max_tokens=800, multiple=1, hidden_size=16)
    assert all({i // 2 for i in batch} == {0, 1} for batches in plan for batch in batches)


def test_greedy_balance_where_the_best_balanced_micro_batches_overflow() -> None:
    """Balanced by cost alone, the costliest group would be alone and the others would not fit in one."""
    shapes = [(14, 1), (8, 1), (2, 4), (22, 1), (2, 2)]
    groups = [group(n, prompt, *[2] * count) for n, (prompt, count) in enumerate(shapes)]
    plan = plan_microbatches(groups, data_size=1, max_tokens=40, multiple=1, hidden_size=1)
    assert sorted(plan[0]) == [[0, 1, 2], [3, 4]]


def test_best_fit_where_nothing_else_finds_room() -> None:
    """5 + 5 and 4 + 3 + 3 fill two micro-batches of 10 to the last token."""
    groups = [group(n, length - 1, 1) for n, length in enumerate([5, 5, 4, 3, 3])]
    plan = plan_microbatches(groups, data_size=1, max_tokens=10, multiple=1)
    assert sorted(plan[0]) == [[0, 1], [2, 3, 4]]


def test_ranks_without_groups_get_empty_micro_batches() -> None:
    assert plan_microbatches([], data_size=2, max_tokens=8, multiple=1) == [[[]], [[]]]
    plan = plan_microbatches([group("a", 3, 2)], data_size=3, max_tokens=8, multiple=1)
    assert sorted(plan) == [[[]], [[]], [[0]]]


def test_whole_data_sets_are_planned_in_pieces() -> None:
    rng = random.Random(0)
    groups = [random_group(rng, i, 100) for i in range(9000)]
    sizes = {"data_size": 2, "max_tokens": 1024, "multiple": 1}
    plan = plan_microbatches(groups, **sizes)
    check(plan, groups, **sizes)
    full = sum(g.num_tokens for g in groups) / (1024 * 2 * len(plan[0]))
    assert full > 0.95


def test_group_longer_than_a_micro_batch() -> None:
    """Callers take such groups out or apart first."""
    groups = [group("fits", 4, 4), group("review-7", 5, 2, 2)]
    with pytest.raises(ValueError, match="review-7"):
        plan_microbatches(groups, data_size=1, max_tokens=9, multiple=2)
    plan_microbatches(groups, data_size=1, max_tokens=9, multiple=1)


def test_ranks_with_other_work_get_the_cheaper_micro_batches() -> None:
    groups = [group(n, length - 1, 1) for n, length in enumerate([10, 9, 6, 5])]
    sizes = {"data_size": 2, "max_tokens": 10, "multiple": 1}
    assert plan_microbatches(groups, **sizes) == [[[0], [3]], [[1], [2]]]
    assert plan_microbatches(groups, **sizes, loads=[0.0, 100.0]) == [[[0], [1]], [[2], [3]]]


def test_cost_is_the_designs_formula() -> None:
    """P = 400, K = 2, R = 50 and 30 at H = 512, worked by hand."""
    pairs = 400 * 400 / 2 + (400 * 50 + 50 * 50 / 2) + (400 * 30 + 30 * 30 / 2)
    assert group_cost(group("a", 400, 50, 30), 512) == pytest.approx(480 + pairs / 3072)


def test_make_microbatch_lays_out_its_groups() -> None:
    groups = [Group("a", (5, 6), ((7,), (8, 9))), Group("b", (10,), ((11,),))]
    batch = make_microbatch(groups, multiple=4)
    assert batch.groups == tuple(groups)
    assert torch.equal(batch.layout.input_ids, torch.tensor([5, 6, 7, 8, 9, 10, 11, 0]))
    assert batch.layout.group_sizes == (2, 1)
    assert make_microbatch([], multiple=4).layout.num_tokens == 4
