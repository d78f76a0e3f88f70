"""The plan for groups that exceed a micro-batch: the parts of their candidates, by rank.

Such a group is trained on in parts: its prompt passes through the model once, then its candidates,
some at a time (exo_megatron/training/oversized.py). All data-parallel ranks work on these groups in
rounds, at most one group per rank and round. If the last round has fewer groups than ranks, several
ranks may take candidates of one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exo_megatron.data.groups import Group
from exo_megatron.data.packing import (
    HIDDEN_SIZE,
    best_fit,
    candidate_cost,
    check_fits_in_parts,
    microbatch_capacity,
    prompt_cost,
)


@dataclass(frozen=True)
class Assignment:
    """The work of one rank on one group in a round, as candidate numbers of each of its passes.

    Attributes:
        group: index into the step's groups; None if the rank has none. Its passes are then of
            padding only, or there are none.
        parts: forward and backward passes, the largest first. Numbers ascend in each.
        scored: forward passes before these, over the candidates of all parts but the first.
    """

    group: int | None
    parts: tuple[tuple[int, ...], ...]
    scored: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Round:
    """One assignment per data-parallel rank.

    `divided` tells whether a group of the round is on several ranks.
    """

    assignments: tuple[Assignment, ...]
    divided: bool


@dataclass(frozen=True)
class OversizedPlan:
    """The plan of one step.

    Attributes:
        ordinary: indices of the groups that fit into a micro-batch.
        rounds: the work on the other groups.
        loads: cost of that work by rank.
    """

    ordinary: tuple[int, ...]
    rounds: tuple[Round, ...]
    loads: tuple[float, ...]


def plan_oversized(
    groups: Sequence[Group],
    *,
    data_size: int,
    max_tokens: int,
    multiple: int,
    hidden_size: int = HIDDEN_SIZE,
    equal_passes: bool = False,
) -> OversizedPlan:
    """Spread the groups of one step that exceed a micro-batch over the data-parallel ranks.

    The plan makes all ranks finish early. It depends on the arguments alone, so every rank may
    compute it for itself.

    A rank holds the activations of a prompt and one part, together at most max_tokens. A pass
    without gradients holds the activations of one layer only, so it may have max_tokens besides the
    prompt.

    Args:
        groups: all groups of the step.
        data_size: number of data-parallel ranks.
        max_tokens: tokens in one micro-batch, padding included.
        multiple: number of tokens of which a micro-batch is a multiple.
        hidden_size: model width, for the estimate of costs.
        equal_passes: whether every rank makes the same number of passes, some of padding only.
            Model copies that share experts must.

    Returns:
        The groups that fit, the rounds for the others, and their cost by rank.

    Raises:
        DataError: a group whose prompt and longest candidate exceed a micro-batch.
    """
    capacity = microbatch_capacity(max_tokens, multiple)
    large = [i for i, group in enumerate(groups) if group.num_tokens > capacity]
    for i in large:
        check_fits_in_parts(groups[i], max_tokens, multiple, f"group {groups[i].id!r}")
    works = [_Work(groups[i], i, capacity, hidden_size) for i in large]
    works.sort(key=lambda work: (-work.cost_on(1), work.index))
    loads = [0.0] * data_size
    rounds = []
    for start in range(0, len(works), data_size):
        round_ = _spread(works[start : start + data_size], loads)
        rounds.append(_equalised(round_) if equal_passes else round_)
    ordinary = tuple(i for i, group in enumerate(groups) if group.num_tokens <= capacity)
    return OversizedPlan(ordinary, tuple(rounds), tuple(loads))


@dataclass(frozen=True)
class _Work:
    """One oversized group with the estimate of its cost, in units of `group_cost`."""

    group: Group
    index: int
    capacity: int
    hidden_size: int

    def assign(self, ranks: int) -> list[Assignment]:
        """Assign the candidates to `ranks` ranks and divide them into parts.

        The longest candidate comes first, each to the rank with the fewest tokens.
        """
        lengths = [len(candidate) for candidate in self.group.candidates]
        per_rank: list[list[int]] = [[] for _ in range(ranks)]
        tokens = [0] * ranks
        for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
            rank = tokens.index(min(tokens))
            per_rank[rank].append(number)
            tokens[rank] += lengths[number]
        return [self._assignment(sorted(numbers), lengths) for numbers in per_rank]

    def _assignment(self, numbers: list[int], lengths: list[int]) -> Assignment:
        parts = _pack(numbers, lengths, self.capacity - len(self.group.prompt))
        later = sorted(number for part in parts[1:] for number in part)
        return Assignment(self.index, parts, _pack(later, lengths, self.capacity))

    def cost(self, assignment: Assignment) -> float:
        """Estimate the cost of an assignment.

        It is forward and backward (3 units) of the prompt and all parts, and a forward (1 unit) of
        all parts but the first.
        """
        prompt = len(self.group.prompt)
        parts = [
            sum(candidate_cost(prompt, len(self.group.candidates[number]), self.hidden_size) for number in part)
            for part in assignment.parts
        ]
        return prompt_cost(prompt, self.hidden_size) + sum(parts) + sum(parts[1:]) / 3

    def cost_on(self, ranks: int) -> float:
        """Estimate the most expensive assignment on `ranks` ranks."""
        return max(self.cost(assignment) for assignment in self.assign(ranks))


def _pack(numbers: list[int], lengths: list[int], capacity: int) -> tuple[tuple[int, ...], ...]:
    """Pack candidates into as few passes as best fit needs, the largest pass first.

    Numbers ascend in each pass.
    """
    packed = best_fit([lengths[number] for number in numbers], capacity)
    passes = [tuple(sorted(numbers[i] for i in items)) for items in packed]
    return tuple(sorted(passes, key=lambda items: (-sum(lengths[number] for number in items), items)))


def _spread(works: Sequence[_Work], loads: list[float]) -> Round:
    """Assign groups, at most as many as ranks, the most expensive first, and add costs to `loads`.

    Each group starts on one rank, the most expensive one on the least loaded rank. While ranks are
    left, the group that would end last gets the least loaded of them, if it then ends earlier. It
    may not, because every rank that joins computes the prompt, too.
    """
    free = sorted(range(len(loads)), key=lambda rank: (loads[rank], rank))
    ranks = [[free.pop(0)] for _ in works]

    def end(place: int, on: list[int]) -> float:
        assignments = works[place].assign(len(on))
        return max(
            loads[rank] + works[place].cost(assignment) for rank, assignment in zip(on, assignments, strict=True)
        )

    while free:
        last = max(range(len(works)), key=lambda place: end(place, ranks[place]))
        more = [*ranks[last], free[0]]
        # Another rank does not help if a rank would be left without candidates.
        if len(more) > len(works[last].group.candidates) or end(last, more) >= end(last, ranks[last]):
            break
        ranks[last].append(free.pop(0))
    assignments = [Assignment(None, (), ())] * len(loads)
    for work, on in zip(works, ranks, strict=True):
        for rank, assignment in zip(on, work.assign(len(on)), strict=True):
            assignments[rank] = assignment
            loads[rank] += work.cost(assignment)
    return Round(tuple(assignments), divided=any(len(on) > 1 for on in ranks))


def _equalised(round_: Round) -> Round:
    """Add empty passes where a rank has fewer than another."""
    parts = max(len(assignment.parts) for assignment in round_.assignments)
    scored = max(len(assignment.scored) for assignment in round_.assignments)

    def filled(passes: tuple[tuple[int, ...], ...], count: int) -> tuple[tuple[int, ...], ...]:
        return passes + ((),) * (count - len(passes))

    assignments = (
        Assignment(assignment.group, filled(assignment.parts, parts), filled(assignment.scored, scored))
        for assignment in round_.assignments
    )
    return Round(tuple(assignments), round_.divided)
