"""Which groups share a packed row, and which data-parallel rank computes it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from exo_megatron.data.groups import Group
from exo_megatron.errors import DataError
from exo_megatron.models.layout import GroupLayout, build_layout

PAIR_COST = 1 / 24576
"""FLOPs of one query-key pair over the linear FLOPs of one token, b / a below: 4 H / 24 H^2 at H = 4096."""


@dataclass(frozen=True)
class MicroBatch:
    """The groups of one packed row, possibly none, and how they lie in it."""

    groups: tuple[Group, ...]
    layout: GroupLayout


def make_microbatch(groups: Sequence[Group], *, multiple: int) -> MicroBatch:
    """Lay out groups in one row, padded to a multiple of `multiple` tokens. No group gives a row of padding."""
    layout = build_layout([group.prompt for group in groups], [group.candidates for group in groups], multiple=multiple)
    return MicroBatch(groups=tuple(groups), layout=layout)


def group_cost(group: Group, pair_cost: float = PAIR_COST) -> float:
    """Cost of one group in units of one token's linear FLOPs.

    (P + sum R) + pair_cost * (P^2 / 2 + sum(P R + R^2 / 2)): every token through the linear layers, each prompt and
    each candidate causally onto itself, and each candidate onto its prompt.
    """
    prompt = len(group.prompt)
    pairs = prompt * prompt / 2 + sum(len(candidate) * (prompt + len(candidate) / 2) for candidate in group.candidates)
    return group.num_tokens + pair_cost * pairs


def plan_microbatches(
    groups: Sequence[Group], *, data_size: int, max_tokens: int, multiple: int, pair_cost: float = PAIR_COST
) -> list[list[list[int]]]:
    """Spread the groups of one optimizer step over micro-batches of about equal cost.

    max_tokens: tokens in one row, padding to `multiple` included. Returns [data rank][micro-batch] -> indices into
    `groups`, ascending: each group once, the same number of micro-batches on every rank (the fewest for which a
    plan is found), some of them empty where groups are few. Depends on the arguments alone, so every rank may
    compute it for itself. Raises DataError for a group that does not fit into one row.
    """
    capacity = max_tokens // multiple * multiple
    tokens = [group.num_tokens for group in groups]
    for group, length in zip(groups, tokens, strict=True):
        if length > capacity:
            raise DataError(
                f"group {group.id!r}",
                f"has {length} tokens ({len(group.prompt)} of the prompt, {len(group.candidates)} candidates)",
                expected=f"at most {capacity}, one packed row (compute.max_tokens_per_microbatch = {max_tokens})",
                fix="raise compute.max_tokens_per_microbatch, or lower the number or the length of candidates",
            )
    costs = [group_cost(group, pair_cost) for group in groups]
    per_rank = max(1, -(-sum(tokens) // (capacity * data_size))) if groups else 1
    while (bins := _fill(costs, tokens, data_size * per_rank, capacity)) is None:
        per_rank += 1
    return _deal(bins, costs, data_size, per_rank)


def _fill(costs: list[float], tokens: list[int], bins: int, capacity: int) -> list[list[int]] | None:
    """Split the groups into `bins` lists within the capacity, with the smallest largest cost found, or None.

    Karmarkar-Karp balances best but knows no capacity; the greedy rules do, and the second packs tightest.
    """
    plans = [_differencing(costs, bins)]
    if not _within(plans[0], tokens, capacity):
        by_cost = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
        by_tokens = sorted(range(len(costs)), key=lambda i: (-tokens[i], i))
        greedy = (
            _greedy(by_cost, costs, tokens, bins, capacity, lambda cost, used: cost),
            _greedy(by_tokens, costs, tokens, bins, capacity, lambda cost, used: -used),
        )
        plans = [plan for plan in greedy if plan is not None]
    return min(plans, key=lambda plan: max(_total(plan_bin, costs) for plan_bin in plan), default=None)


def _within(plan: list[list[int]], tokens: list[int], capacity: int) -> bool:
    return all(sum(tokens[i] for i in plan_bin) <= capacity for plan_bin in plan)


def _greedy(
    order: list[int],
    costs: list[float],
    tokens: list[int],
    bins: int,
    capacity: int,
    preference: Callable[[float, int], float],
) -> list[list[int]] | None:
    """Put each group, in this order, into the bin with room that has the smallest preference(cost, tokens used)."""
    plan: list[list[int]] = [[] for _ in range(bins)]
    cost, used = [0.0] * bins, [0] * bins
    for i in order:
        room = [b for b in range(bins) if used[b] + tokens[i] <= capacity]
        if not room:
            return None
        chosen = min(room, key=lambda b: (preference(cost[b], used[b]), b))
        plan[chosen].append(i)
        cost[chosen] += costs[i]
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


def _deal(bins: list[list[int]], costs: list[float], data_size: int, per_rank: int) -> list[list[list[int]]]:
    """Give every rank `per_rank` bins, the most expensive first and always to the rank with the least so far."""
    ranks: list[list[list[int]]] = [[] for _ in range(data_size)]
    load = [0.0] * data_size
    for plan_bin in sorted(bins, key=lambda plan_bin: (-_total(plan_bin, costs), min(plan_bin, default=-1))):
        rank = min((r for r in range(data_size) if len(ranks[r]) < per_rank), key=lambda r: (load[r], r))
        ranks[rank].append(sorted(plan_bin))
        load[rank] += _total(plan_bin, costs)
    return ranks


def _total(plan_bin: list[int], costs: list[float]) -> float:
    return sum(costs[i] for i in plan_bin)
