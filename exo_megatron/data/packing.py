"""Which groups share a packed row, and which data-parallel rank computes it."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from exo_megatron.data.groups import Group
from exo_megatron.models.layout import GroupLayout, build_layout

HIDDEN_SIZE = 4096
"""Model width assumed where the caller names none: the balance depends on it only weakly."""

WINDOW = 4096
"""Groups planned together; longer lists (a whole data set to be scored) are planned window by window."""


@dataclass(frozen=True)
class MicroBatch:
    """The groups of one packed row, possibly none, and how they lie in it."""

    groups: tuple[Group, ...]
    layout: GroupLayout


def make_microbatch(groups: Sequence[Group], *, multiple: int) -> MicroBatch:
    """Lay out groups in one row, padded to a multiple of `multiple` tokens. No group gives a row of padding."""
    layout = build_layout([group.prompt for group in groups], [group.candidates for group in groups], multiple=multiple)
    return MicroBatch(groups=tuple(groups), layout=layout)


def row_capacity(max_tokens: int, multiple: int) -> int:
    """Tokens of the longest row of at most max_tokens, padding included, that is a multiple of `multiple`."""
    return max_tokens // multiple * multiple


def group_cost(group: Group, hidden_size: int = HIDDEN_SIZE) -> float:
    """Cost of one group in units of one token's linear FLOPs.

    (P + sum R) + b/a * (P^2 / 2 + sum(P R + R^2 / 2)): every token through the linear layers, each prompt and each
    candidate causally onto itself, and each candidate onto its prompt. b/a = 1 / (6 H): a layer spends 4 H FLOPs on
    a query-key pair and, in the usual proportions of 12 H^2 weights, 24 H^2 on the linear part of a token.
    """
    prompt = len(group.prompt)
    responses = sum(candidate_cost(prompt, len(candidate), hidden_size) for candidate in group.candidates)
    return prompt_cost(prompt, hidden_size) + responses


def prompt_cost(prompt: int, hidden_size: int) -> float:
    """The share of a prompt of that many tokens in `group_cost`."""
    return prompt + prompt * prompt / 2 / (6 * hidden_size)


def candidate_cost(prompt: int, response: int, hidden_size: int) -> float:
    """The share of one candidate of that many tokens."""
    return response + response * (prompt + response / 2) / (6 * hidden_size)


def plan_microbatches(
    groups: Sequence[Group],
    *,
    data_size: int,
    max_tokens: int,
    multiple: int,
    hidden_size: int = HIDDEN_SIZE,
    loads: Sequence[float] | None = None,
) -> list[list[list[int]]]:
    """Spread the groups of one optimizer step over micro-batches of about equal cost.

    max_tokens: tokens in one row, padding to `multiple` included. loads: what each rank has to do besides, in units of
    `group_cost`; ranks with more of it get the cheaper rows. Returns [data rank][micro-batch] -> indices into
    `groups`, ascending: each group once, the same number of micro-batches on every rank (as few as best-fit packing
    needs), some of them empty where groups are few. Depends on the arguments alone, so every rank may compute it
    for itself. Raises ValueError for a group that does not fit into one row: data/oversized.py is for those.
    """
    capacity = row_capacity(max_tokens, multiple)
    for group in groups:
        if group.num_tokens > capacity:
            raise ValueError(f"group {group.id!r} has {group.num_tokens} tokens, a row {capacity}")
    plan: list[list[list[int]]] = [[] for _ in range(data_size)]
    load = list(loads or [0.0] * data_size)
    for start in range(0, max(1, len(groups)), WINDOW):
        window = groups[start : start + WINDOW]
        costs = [group_cost(group, hidden_size) for group in window]
        bins = _fill(costs, [group.num_tokens for group in window], data_size, capacity)
        for rank, rows in enumerate(_deal(bins, costs, load)):
            plan[rank] += [sorted(start + i for i in row) for row in rows]
    return plan


def _fill(costs: list[float], tokens: list[int], data_size: int, capacity: int) -> list[list[int]]:
    """Split the groups into a multiple of data_size bins within the capacity.

    Karmarkar-Karp balances best but knows no capacity. Where its bins overflow, the greedy rule takes its place,
    and where that finds no room the best-fit packing, whose bins are then nearly all full.
    """
    packed = best_fit(tokens, capacity)
    bins = max(1, -(-len(packed) // data_size)) * data_size
    balanced = _differencing(costs, bins)
    if all(sum(tokens[i] for i in items) <= capacity for items in balanced):
        return balanced
    return _least_loaded(costs, tokens, bins, capacity) or packed + [[] for _ in range(bins - len(packed))]


def best_fit(tokens: list[int], capacity: int) -> list[list[int]]:
    """Longest first, each into the fullest bin that has room, or into a new one."""
    plan: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for i in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        place = bisect_left(room, (tokens[i], -1))
        if place == len(room):
            free, chosen = capacity, len(plan)
            plan.append([])
        else:
            free, chosen = room.pop(place)
        plan[chosen].append(i)
        insort(room, (free - tokens[i], chosen))
    return plan


def _least_loaded(costs: list[float], tokens: list[int], bins: int, capacity: int) -> list[list[int]] | None:
    """Most expensive first, each into the cheapest bin that has room; None where one finds no room."""
    plan: list[list[int]] = [[] for _ in range(bins)]
    load, used = [0.0] * bins, [0] * bins
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        chosen = min((b for b in range(bins) if used[b] + tokens[i] <= capacity), key=load.__getitem__, default=None)
        if chosen is None:
            return None
        plan[chosen].append(i)
        load[chosen] += costs[i]
        used[chosen] += tokens[i]
    return plan


@dataclass(frozen=True)
class _Partition:
    """A partial plan of the differencing method: its non-empty bins, largest cost first."""

    costs: list[float]
    items: list[list[int]]

    def spread(self, bins: int) -> float:
        """Difference between the largest and the smallest bin; an absent bin costs nothing."""
        return self.costs[0] - (self.costs[-1] if len(self.costs) == bins else 0.0)


def _differencing(costs: list[float], bins: int) -> list[list[int]]:
    """Karmarkar-Karp for k bins: join the two partial plans of largest spread, largest bins with smallest."""
    plans = [_Partition([cost], [[i]]) for i, cost in enumerate(costs)]
    heap = [(-plan.spread(bins), i, plan) for i, plan in enumerate(plans)]
    heapq.heapify(heap)
    tie_break = len(heap)
    while len(heap) > 1:
        first, second = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        joined = _join(first, second, bins)
        heapq.heappush(heap, (-joined.spread(bins), tie_break, joined))
        tie_break += 1
    filled = heap[0][2].items if heap else []
    return filled + [[] for _ in range(bins - len(filled))]


def _join(first: _Partition, second: _Partition, bins: int) -> _Partition:
    """Bin i of the first with bin (bins - 1 - i) of the second; only `shared` of those pairs are both non-empty."""
    shared = max(0, len(first.costs) + len(second.costs) - bins)
    alone, other = len(first.costs) - shared, len(second.costs) - shared
    merged = list(zip(first.costs[:alone], first.items[:alone], strict=True))
    merged += zip(second.costs[:other], second.items[:other], strict=True)
    for k in range(shared):
        i, j = alone + k, len(second.costs) - 1 - k
        merged.append((first.costs[i] + second.costs[j], first.items[i] + second.items[j]))
    merged.sort(key=lambda pair: (-pair[0], pair[1][0]))
    return _Partition([cost for cost, _ in merged], [items for _, items in merged])


def _deal(bins: list[list[int]], costs: list[float], load: list[float]) -> list[list[list[int]]]:
    """Give every rank the same number of bins, the most expensive first and always to the rank with the least.

    load: what each rank has to do already; what it gets is added.
    """
    totals = [sum(costs[i] for i in items) for items in bins]
    per_rank = len(bins) // len(load)
    ranks: list[list[list[int]]] = [[] for _ in load]
    for b in sorted(range(len(bins)), key=lambda b: (-totals[b], b)):
        rank = min((r for r in range(len(load)) if len(ranks[r]) < per_rank), key=load.__getitem__)
        ranks[rank].append(bins[b])
        load[rank] += totals[b]
    return ranks
