"""The plan of groups that exceed a micro-batch: every candidate once, within the limit, the same on every rank."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from exo_megatron.data.groups import Group
from exo_megatron.data.oversized import Assignment, OversizedPlan, plan_oversized
from exo_megatron.data.packing import fit_candidates, group_cost
from exo_megatron.errors import DataError

WIDE = 10**9
"""A hidden size at which a token costs 1, whatever it sees."""


def group(name: object, prompt: int, *lengths: int) -> Group:
    rewards = tuple(float(k) for k in range(len(lengths)))
    return Group(str(name), (1,) * prompt, tuple((2,) * length for length in lengths), rewards)


def assignments_of(plan: OversizedPlan, number: int) -> list[Assignment]:
    return [assignment for round_ in plan.rounds for assignment in round_.assignments if assignment.group == number]


def check(plan: OversizedPlan, groups: Sequence[Group], *, data_size: int, capacity: int) -> None:
    large = {i for i, each in enumerate(groups) if each.num_tokens > capacity}
    assert set(plan.ordinary) == set(range(len(groups))) - large
    assert all(len(round_.assignments) == data_size for round_ in plan.rounds)
    for number in large:
        dealt = [k for assignment in assignments_of(plan, number) for part in assignment.parts for k in part]
        assert sorted(dealt) == list(range(len(groups[number].candidates)))
        for assignment in assignments_of(plan, number):
            lengths = [sum(len(groups[number].candidates[k]) for k in part) for part in assignment.parts]
            assert max(lengths) + len(groups[number].prompt) <= capacity
            assert lengths == sorted(lengths, reverse=True)
            scored = [sum(len(groups[number].candidates[k]) for k in part) for part in assignment.scored]
            assert max(scored, default=0) <= capacity
            later = [k for part in assignment.parts[1:] for k in part]
            assert sorted(k for part in assignment.scored for k in part) == sorted(later)
    assert {assignment.group for round_ in plan.rounds for assignment in round_.assignments} - {None} == large


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
            passes = [
                {(len(assignment.parts), len(assignment.scored)) for assignment in round_.assignments}
                for round_ in plan.rounds
            ]
            assert all(len(each) == 1 for each in passes)
        else:
            assert all(
                part
                for round_ in plan.rounds
                for assignment in round_.assignments
                for part in assignment.parts + assignment.scored
            )
    assert plan_oversized(groups, **sizes) == plan_oversized(groups, **sizes)


def test_a_group_alone_is_split_into_as_few_parts_as_fit() -> None:
    plan = plan_oversized([group("a", 4, 3, 6, 2, 5)], data_size=1, max_tokens=12, multiple=1)
    (round_,) = plan.rounds
    assert round_.assignments == (Assignment(0, parts=((0, 3), (1, 2)), scored=((1, 2),)),)
    assert not round_.divided
    (round_,) = plan_oversized([group("a", 4, 3, 6, 2, 5)], data_size=1, max_tokens=10, multiple=1).rounds
    assert round_.assignments == (Assignment(0, parts=((1,), (0, 2), (3,)), scored=((0, 2, 3),)),)


def test_costs_are_those_of_the_passes() -> None:
    """Prompt and candidates forward and backward, which is the cost of the group, and a third more for later parts."""
    large = group("a", 4, 3, 6, 2, 5)
    plan = plan_oversized([large], data_size=1, max_tokens=12, multiple=1, hidden_size=WIDE)
    assert plan.loads == pytest.approx((group_cost(large, WIDE) + 8 / 3,))


def test_as_many_groups_as_ranks_get_a_rank_each_and_the_last_round_is_divided() -> None:
    groups = [group(n, 4, *[8] * 4) for n in range(3)] + [group("small", 2, 2)]
    plan = plan_oversized(groups, data_size=2, max_tokens=12, multiple=1)
    first, last = plan.rounds
    assert not first.divided
    assert sorted(assignment.group for assignment in first.assignments if assignment.group is not None) == [0, 1]
    assert last.divided
    assert [assignment.group for assignment in last.assignments] == [2, 2]
    assert sorted(len(assignment.parts) for assignment in last.assignments) == [2, 2]
    assert plan.ordinary == (3,)


def test_no_rank_joins_that_would_end_later() -> None:
    """Two candidates of two tokens behind ten of a prompt: a rank that helps spends 12, and the other still 12."""
    sizes = {"data_size": 2, "max_tokens": 12, "multiple": 1, "hidden_size": WIDE}
    (round_,) = plan_oversized([group("a", 10, 2, 2)], **sizes).rounds
    assert round_.divided  # 12 and 12 instead of 14 and a second forward of 2
    busy = [group("a", 10, 2, 2), group("b", 1, *[11] * 9), group("c", 1, *[11] * 2)]
    plan = plan_oversized(busy, **sizes)
    assert len(plan.rounds) == 2
    assert not plan.rounds[1].divided  # the rank with b ends late enough


def test_more_ranks_than_candidates() -> None:
    (round_,) = plan_oversized([group("a", 4, 6, 7)], data_size=4, max_tokens=11, multiple=1).rounds
    assert sorted(assignment.parts for assignment in round_.assignments) == [(), (), ((0,),), ((1,),)]
    (round_,) = plan_oversized([group("a", 4, 6, 7)], data_size=4, max_tokens=11, multiple=1, equal_passes=True).rounds
    assert sorted(assignment.parts for assignment in round_.assignments) == [((),), ((),), ((0,),), ((1,),)]


def test_prompt_and_longest_candidate_must_fit() -> None:
    groups = [group("fits", 5, 4, 4), group("review-7", 5, 5, 1, 2)]
    with pytest.raises(DataError) as error:
        plan_oversized(groups, data_size=1, max_tokens=9, multiple=4)
    for part in ("fits", "5 tokens of the prompt", "4 of its longest", "at most 8", "max_tokens_per_microbatch = 9"):
        assert part in str(error.value)
    with pytest.raises(DataError, match="review-7"):
        plan_oversized(groups, data_size=1, max_tokens=9, multiple=1)
    assert plan_oversized(groups, data_size=1, max_tokens=10, multiple=1).ordinary == ()


def test_pieces_of_a_group_repeat_the_prompt_and_keep_the_order() -> None:
    whole = replace(group("a", 4, 3, 6, 2, 5), reference_logprobs=(-1.0, -2.0, -3.0, -4.0))
    pieces = list(fit_candidates(whole, max_tokens=13, multiple=2))
    assert [tuple(len(candidate) for candidate in piece.candidates) for piece in pieces] == [(3,), (6, 2), (5,)]
    assert all(piece.prompt == whole.prompt and piece.id == "a" for piece in pieces)
    assert [piece.rewards for piece in pieces] == [(0.0,), (1.0, 2.0), (3.0,)]
    assert list(fit_candidates(whole, max_tokens=20, multiple=1)) == [whole]
    with pytest.raises(DataError, match="'a'"):
        list(fit_candidates(whole, max_tokens=9, multiple=1))


@pytest.mark.parametrize(
    ("max_tokens", "parts"),
    # 17 tokens in one micro-batch.
    [(17, [4]), (16, [3, 1]), (11, [2, 1, 1]), (12, [3, 1]), (8, [2, 1, 1])],
)
def test_a_group_takes_as_few_micro_batches_as_fit(max_tokens: int, parts: list[int]) -> None:
    whole = group("a", 3, 2, 3, 4, 5)
    pieces = list(fit_candidates(whole, max_tokens=max_tokens, multiple=1))
    assert [len(piece.candidates) for piece in pieces] == parts
    assert [candidate for piece in pieces for candidate in piece.candidates] == list(whole.candidates)
    assert all(piece.num_tokens <= max_tokens for piece in pieces)
