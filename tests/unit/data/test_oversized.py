"""The plan of groups that exceed a row: every candidate once, within the limit, early ends, the same on every rank."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from exo_megatron.data.groups import Group
from exo_megatron.data.oversized import OversizedPlan, Share, plan_oversized, rows_of_group
from exo_megatron.data.packing import group_cost
from exo_megatron.errors import DataError

WIDE = 10**9
"""A hidden size at which a token costs 1, whatever it sees."""


def group(name: object, prompt: int, *responses: int) -> Group:
    rewards = tuple(float(k) for k in range(len(responses)))
    return Group(str(name), (1,) * prompt, tuple((2,) * length for length in responses), rewards)


def shares_of(plan: OversizedPlan, number: int) -> list[Share]:
    return [share for wave in plan.waves for share in wave.shares if share.group == number]


def check(plan: OversizedPlan, groups: Sequence[Group], *, data_size: int, capacity: int) -> None:
    large = {i for i, each in enumerate(groups) if each.num_tokens > capacity}
    assert set(plan.ordinary) == set(range(len(groups))) - large
    assert all(len(wave.shares) == data_size for wave in plan.waves)
    for number in large:
        dealt = [k for share in shares_of(plan, number) for part in share.parts for k in part]
        assert sorted(dealt) == list(range(len(groups[number].candidates)))
        for share in shares_of(plan, number):
            lengths = [sum(len(groups[number].candidates[k]) for k in part) for part in share.parts]
            assert max(lengths) + len(groups[number].prompt) <= capacity
            assert lengths == sorted(lengths, reverse=True)
            scored = [sum(len(groups[number].candidates[k]) for k in row) for row in share.scored]
            assert max(scored, default=0) <= capacity
            later = [k for part in share.parts[1:] for k in part]
            assert sorted(k for row in share.scored for k in row) == sorted(later)
    assert {share.group for wave in plan.waves for share in wave.shares} - {None} == large


@pytest.mark.parametrize("seed", range(60))
def test_every_plan_is_whole_fits_and_repeats(seed: int) -> None:
    rng = random.Random(seed)
    multiple = rng.choice([1, 2, 8])
    sizes = {"data_size": rng.choice([1, 2, 3, 8]), "max_tokens": rng.choice([64, 77]), "multiple": multiple}
    groups = [
        group(n, rng.randint(1, 40), *(rng.randint(1, 24) for _ in range(rng.randint(1, 9))))
        for n in range(rng.choice([1, 2, 5, 17]))
    ]
    for equal_passes in (False, True):
        plan = plan_oversized(groups, **sizes, hidden_size=rng.choice([16, WIDE]), equal_passes=equal_passes)
        check(plan, groups, data_size=sizes["data_size"], capacity=sizes["max_tokens"] // multiple * multiple)
        if equal_passes:
            passes = [{(len(share.parts), len(share.scored)) for share in wave.shares} for wave in plan.waves]
            assert all(len(each) == 1 for each in passes)
        else:
            assert all(part for wave in plan.waves for share in wave.shares for part in share.parts + share.scored)
    assert plan_oversized(groups, **sizes) == plan_oversized(groups, **sizes)


def test_a_group_alone_is_split_into_as_few_parts_as_fit() -> None:
    plan = plan_oversized([group("a", 4, 3, 6, 2, 5)], data_size=1, max_tokens=12, multiple=1)
    (wave,) = plan.waves
    assert wave.shares == (Share(0, parts=((0, 3), (1, 2)), scored=((1, 2),)),)
    assert not wave.spread
    (wave,) = plan_oversized([group("a", 4, 3, 6, 2, 5)], data_size=1, max_tokens=10, multiple=1).waves
    assert wave.shares == (Share(0, parts=((1,), (0, 2), (3,)), scored=((0, 2, 3),)),)


def test_costs_are_those_of_the_passes() -> None:
    """Prompt and candidates forward and backward, which is the cost of the group, and a third more for later parts."""
    large = group("a", 4, 3, 6, 2, 5)
    plan = plan_oversized([large], data_size=1, max_tokens=12, multiple=1, hidden_size=WIDE)
    assert plan.loads == pytest.approx((group_cost(large, WIDE) + 8 / 3,))


def test_as_many_groups_as_ranks_get_a_rank_each_and_the_last_wave_is_spread() -> None:
    groups = [group(n, 4, *[8] * 4) for n in range(3)] + [group("small", 2, 2)]
    plan = plan_oversized(groups, data_size=2, max_tokens=12, multiple=1)
    first, last = plan.waves
    assert not first.spread
    assert sorted(share.group for share in first.shares if share.group is not None) == [0, 1]
    assert last.spread
    assert [share.group for share in last.shares] == [2, 2]
    assert sorted(len(share.parts) for share in last.shares) == [2, 2]
    assert plan.ordinary == (3,)


def test_no_rank_joins_that_would_end_later() -> None:
    """Two candidates of two tokens behind ten of a prompt: a rank that helps spends 12, and the other still 12."""
    sizes = {"data_size": 2, "max_tokens": 12, "multiple": 1, "hidden_size": WIDE}
    (wave,) = plan_oversized([group("a", 10, 2, 2)], **sizes).waves
    assert wave.spread  # 12 and 12 instead of 14 and a second forward of 2
    busy = [group("a", 10, 2, 2), group("b", 1, *[11] * 9), group("c", 1, *[11] * 2)]
    plan = plan_oversized(busy, **sizes)
    assert len(plan.waves) == 2
    assert not plan.waves[1].spread  # the rank with b ends late enough


def test_more_ranks_than_candidates() -> None:
    (wave,) = plan_oversized([group("a", 4, 6, 7)], data_size=4, max_tokens=11, multiple=1).waves
    assert sorted(share.parts for share in wave.shares) == [(), (), ((0,),), ((1,),)]
    (wave,) = plan_oversized([group("a", 4, 6, 7)], data_size=4, max_tokens=11, multiple=1, equal_passes=True).waves
    assert sorted(share.parts for share in wave.shares) == [((),), ((),), ((0,),), ((1,),)]


def test_prompt_and_longest_candidate_must_fit() -> None:
    groups = [group("fits", 5, 4, 4), group("review-7", 5, 5, 1, 2)]
    with pytest.raises(DataError) as error:
        plan_oversized(groups, data_size=1, max_tokens=9, multiple=4)
    for part in ("fits", "5 tokens of the prompt", "4 of its longest", "at most 8", "max_tokens_per_microbatch = 9"):
        assert part in str(error.value)
    with pytest.raises(DataError, match="review-7"):
        plan_oversized(groups, data_size=1, max_tokens=9, multiple=1)
    assert plan_oversized(groups, data_size=1, max_tokens=10, multiple=1).ordinary == ()


def test_rows_of_a_group_repeat_the_prompt_and_keep_the_order() -> None:
    whole = replace(group("a", 4, 3, 6, 2, 5), reference_logprobs=(-1.0, -2.0, -3.0, -4.0))
    rows = list(rows_of_group(whole, max_tokens=13, multiple=2))
    assert [tuple(len(candidate) for candidate in row.candidates) for row in rows] == [(3,), (6, 2), (5,)]
    assert all(row.prompt == whole.prompt and row.id == "a" for row in rows)
    assert [row.rewards for row in rows] == [(0.0,), (1.0, 2.0), (3.0,)]
    assert list(rows_of_group(whole, max_tokens=20, multiple=1)) == [whole]
    with pytest.raises(DataError, match="'a'"):
        list(rows_of_group(whole, max_tokens=9, multiple=1))


@pytest.mark.parametrize(
    ("max_tokens", "parts"),
    # 17 tokens in one row.
    [(17, [4]), (16, [3, 1]), (11, [2, 1, 1]), (12, [3, 1]), (8, [2, 1, 1])],
)
def test_a_group_takes_as_few_rows_as_fit(max_tokens: int, parts: list[int]) -> None:
    whole = group("a", 3, 2, 3, 4, 5)
    rows = list(rows_of_group(whole, max_tokens=max_tokens, multiple=1))
    assert [len(row.candidates) for row in rows] == parts
    assert [candidate for row in rows for candidate in row.candidates] == list(whole.candidates)
    assert all(row.num_tokens <= max_tokens for row in rows)
