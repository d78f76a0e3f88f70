"""Groups that do not fit into one packed row: which of their candidates go together, and on which rank.

Such a group is trained on in parts: its prompt passes through the model once, then its candidates, some at a time
(exo_megatron/training/oversized.py). All data-parallel ranks work on these groups in waves, at most one group per
rank and wave. Where the last wave has fewer groups than ranks, several ranks may take candidates of one group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from exo_megatron.data.groups import Group
from exo_megatron.data.packing import HIDDEN_SIZE, best_fit, candidate_cost, prompt_cost, row_capacity
from exo_megatron.errors import DataError


@dataclass(frozen=True)
class Share:
    """What one rank does of one group in a wave: the candidates (numbers, ascending) of each of its passes.

    parts: forward and backward, the largest first. scored: forward alone before that, the candidates of all parts but
    the first. group: index into the step's groups, None where the rank has none; its passes are then of padding only,
    or there are none.
    """

    group: int | None
    parts: tuple[tuple[int, ...], ...]
    scored: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Wave:
    """One share per data-parallel rank. spread: whether a group of the wave is on several ranks."""

    shares: tuple[Share, ...]
    spread: bool


@dataclass(frozen=True)
class OversizedPlan:
    """ordinary: indices of the groups that fit into a row. waves: the work on the others. loads: its cost by rank."""

    ordinary: tuple[int, ...]
    waves: tuple[Wave, ...]
    loads: tuple[float, ...]


def check_fits_in_parts(group: Group, *, max_tokens: int, multiple: int) -> None:
    """Raise DataError for a group that fits into a row in no way: its prompt and longest candidate are too long."""
    longest = max(len(candidate) for candidate in group.candidates)
    capacity = row_capacity(max_tokens, multiple)
    if len(group.prompt) + longest > capacity:
        raise DataError(
            f"group {group.id!r}",
            f"{len(group.prompt)} tokens of the prompt and {longest} of its longest candidate",
            expected=f"at most {capacity} together, one packed row (compute.max_tokens_per_microbatch = {max_tokens})",
            fix="raise compute.max_tokens_per_microbatch, or shorten prompts or candidates",
        )


def rows_of_group(group: Group, *, max_tokens: int, multiple: int) -> Iterator[Group]:
    """The group's candidates, in order, in as few groups with its prompt as fit into a row each.

    For passes without gradients. The group itself where it fits. Raises DataError where no split helps.
    """
    check_fits_in_parts(group, max_tokens=max_tokens, multiple=multiple)
    room = row_capacity(max_tokens, multiple) - len(group.prompt)
    taken: list[int] = []
    used = 0
    for number, candidate in enumerate(group.candidates):
        if used + len(candidate) > room:
            yield group.take(taken)
            taken, used = [], 0
        taken.append(number)
        used += len(candidate)
    yield group.take(taken)


def plan_oversized(
    groups: Sequence[Group],
    *,
    data_size: int,
    max_tokens: int,
    multiple: int,
    hidden_size: int = HIDDEN_SIZE,
    equal_passes: bool = False,
) -> OversizedPlan:
    """Find the groups of one step that exceed a row, and spread them over ranks so that all finish early.

    A rank holds the activations of a prompt and one part: together at most max_tokens. A pass without gradients holds
    those of one layer, which are few: it may have max_tokens beside the prompt. equal_passes: every rank makes as many
    passes as any other (model copies that share experts must), some of padding only. Depends on the arguments alone,
    so every rank may compute it for itself. Raises DataError for a group that fits in no way.
    """
    capacity = row_capacity(max_tokens, multiple)
    large = [i for i, group in enumerate(groups) if group.num_tokens > capacity]
    for i in large:
        check_fits_in_parts(groups[i], max_tokens=max_tokens, multiple=multiple)
    works = [_Work(groups[i], i, capacity, hidden_size) for i in large]
    works.sort(key=lambda work: (-work.cost_on(1), work.index))
    loads = [0.0] * data_size
    waves = []
    for start in range(0, len(works), data_size):
        wave = _spread(works[start : start + data_size], loads)
        waves.append(_equalised(wave) if equal_passes else wave)
    ordinary = tuple(i for i, group in enumerate(groups) if group.num_tokens <= capacity)
    return OversizedPlan(ordinary, tuple(waves), tuple(loads))


@dataclass(frozen=True)
class _Work:
    """One oversized group and what it costs, in units of `group_cost`."""

    group: Group
    index: int
    capacity: int
    hidden_size: int

    def deal(self, ranks: int) -> list[Share]:
        """Its candidates over so many ranks, longest first to the rank with the fewest tokens, then into parts."""
        lengths = [len(candidate) for candidate in self.group.candidates]
        hands: list[list[int]] = [[] for _ in range(ranks)]
        tokens = [0] * ranks
        for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
            rank = tokens.index(min(tokens))
            hands[rank].append(number)
            tokens[rank] += lengths[number]
        return [self._share(sorted(hand), lengths) for hand in hands]

    def _share(self, hand: list[int], lengths: list[int]) -> Share:
        def rows(numbers: list[int], room: int) -> tuple[tuple[int, ...], ...]:
            packed = best_fit([lengths[number] for number in numbers], room)
            found = [tuple(sorted(numbers[i] for i in row)) for row in packed]
            return tuple(sorted(found, key=lambda row: (-sum(lengths[number] for number in row), row)))

        parts = rows(hand, self.capacity - len(self.group.prompt))
        later = sorted(number for part in parts[1:] for number in part)
        return Share(self.index, parts, rows(later, self.capacity))

    def cost(self, share: Share) -> float:
        """Forward and backward (3 units) of the prompt and all parts, and a forward (1 unit) of all but the first."""
        prompt = len(self.group.prompt)
        parts = [
            sum(candidate_cost(prompt, len(self.group.candidates[number]), self.hidden_size) for number in part)
            for part in share.parts
        ]
        return prompt_cost(prompt, self.hidden_size) + sum(parts) + sum(parts[1:]) / 3

    def cost_on(self, ranks: int) -> float:
        """Of the most expensive share on so many ranks."""
        return max(self.cost(share) for share in self.deal(ranks))


def _spread(works: Sequence[_Work], loads: list[float]) -> Wave:
    """At most as many groups as ranks, most expensive first; adds their costs to `loads`.

    Each starts on one rank, the costliest where there is least to do. While ranks are left, the group that would end
    last gets the least loaded of them, if it then ends earlier: every rank that joins computes the prompt, too.
    """
    free = sorted(range(len(loads)), key=lambda rank: (loads[rank], rank))
    ranks = [[free.pop(0)] for _ in works]

    def end(place: int, on: list[int]) -> float:
        shares = works[place].deal(len(on))
        return max(loads[rank] + works[place].cost(share) for rank, share in zip(on, shares, strict=True))

    while free:
        last = max(range(len(works)), key=lambda place: end(place, ranks[place]))
        more = [*ranks[last], free[0]]
        # A rank may be left without candidates: then one more does not help.
        if len(more) > len(works[last].group.candidates) or end(last, more) >= end(last, ranks[last]):
            break
        ranks[last].append(free.pop(0))
    shares = [Share(None, (), ())] * len(loads)
    for work, on in zip(works, ranks, strict=True):
        for rank, share in zip(on, work.deal(len(on)), strict=True):
            shares[rank] = share
            loads[rank] += work.cost(share)
    return Wave(tuple(shares), spread=any(len(on) > 1 for on in ranks))


def _equalised(wave: Wave) -> Wave:
    """The wave with empty passes where a rank has fewer than another."""
    parts = max(len(share.parts) for share in wave.shares)
    scored = max(len(share.scored) for share in wave.shares)

    def filled(rows: tuple[tuple[int, ...], ...], count: int) -> tuple[tuple[int, ...], ...]:
        return rows + ((),) * (count - len(rows))

    shares = (Share(share.group, filled(share.parts, parts), filled(share.scored, scored)) for share in wave.shares)
    return Wave(tuple(shares), wave.spread)
