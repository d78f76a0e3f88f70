"""The groups of each micro-batch and of each data-parallel rank."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from exo_megatron.config.sections import ComputeConfig, ParallelConfig
from exo_megatron.data.groups import Group, GroupLengths
from exo_megatron.data.prepared import PreparedGroups
from exo_megatron.errors import DataError
from exo_megatron.models.layouts.groups import GroupLayout, build_layout
from exo_megatron.models.spec import ModelSpec

HIDDEN_SIZE = 4096
"""Model width if the caller gives none: the balance depends on it only weakly."""

WINDOW = 4096
"""Number of groups planned together. Longer lists, as for scoring, are planned window by window."""


@dataclass(frozen=True)
class MicroBatch:
    """The groups of one micro-batch, possibly none, and their layout."""

    groups: tuple[Group, ...]
    layout: GroupLayout


def make_microbatch(groups: Sequence[Group], *, multiple: int) -> MicroBatch:
    """Lay out groups in one micro-batch, padded to a multiple of `multiple` tokens.

    Without groups the micro-batch is padding only.
    """
    layout = build_layout([group.prompt for group in groups], [group.candidates for group in groups], multiple=multiple)
    return MicroBatch(groups=tuple(groups), layout=layout)


def microbatch_capacity(max_tokens: int, multiple: int) -> int:
    """Return the largest multiple of `multiple` tokens that is at most max_tokens."""
    return max_tokens // multiple * multiple


def check_groups(groups: Sequence[Group], spec: ModelSpec, compute: ComputeConfig, parallel: ParallelConfig) -> None:
    """Raise DataError for a group that is too long for the model or for a micro-batch.

    It is too long if its prompt with its longest candidate needs more positions than the model has
    or more tokens than a micro-batch holds.
    """
    longest = _lengths(groups).longest
    capacity = microbatch_capacity(compute.max_tokens_per_microbatch, parallel.token_multiple)
    if (over := np.flatnonzero(longest > spec.max_positions)).size:
        raise DataError(
            _place(groups, int(over[0])),
            f"prompt and candidate need {longest[over[0]]} positions{_and_more(over.size)}",
            expected=f"at most {spec.max_positions}, the model's positions",
            fix="shorten it, or lower data.max_prompt_tokens and data.max_completion_tokens",
        )
    if (over := np.flatnonzero(longest > capacity)).size:
        group, place = groups[int(over[0])], _place(groups, int(over[0]))
        check_fits_in_parts(group, compute.max_tokens_per_microbatch, parallel.token_multiple, place)


def check_whole(groups: Sequence[Group], compute: ComputeConfig, parallel: ParallelConfig) -> None:
    """Raise DataError for a group that exceeds a micro-batch, for losses that need whole groups."""
    tokens = _lengths(groups).tokens
    capacity = microbatch_capacity(compute.max_tokens_per_microbatch, parallel.token_multiple)
    if (over := np.flatnonzero(tokens > capacity)).size:
        raise DataError(
            _place(groups, int(over[0])),
            f"has {tokens[over[0]]} tokens, and the loss needs log-probs of single tokens",
            expected=f"at most {capacity}, one micro-batch (compute.max_tokens_per_microbatch)",
            fix=f"raise compute.max_tokens_per_microbatch, or remove such groups ({over.size})",
        )


def _lengths(groups: Sequence[Group]) -> GroupLengths:
    return groups.lengths if isinstance(groups, PreparedGroups) else GroupLengths.of(groups)


def _place(groups: Sequence[Group], number: int) -> str:
    """Name a group, and the place of its record where that is known."""
    name = f"group {groups[number].id!r}"
    return f"{groups.where(number)}: {name}" if isinstance(groups, PreparedGroups) else name


def _and_more(count: int) -> str:
    return "" if count == 1 else f" (as {count} groups do, this is the first)"


def check_fits_in_parts(group: Group, max_tokens: int, multiple: int, place: str) -> None:
    """Raise DataError at `place` if a group's prompt and longest candidate exceed a micro-batch together."""
    longest = max(len(candidate) for candidate in group.candidates)
    capacity = microbatch_capacity(max_tokens, multiple)
    if len(group.prompt) + longest > capacity:
        raise DataError(
            place,
            f"has {len(group.prompt)} tokens of the prompt and {longest} of its longest candidate",
            expected=f"at most {capacity} together, one micro-batch (compute.max_tokens_per_microbatch = {max_tokens})",
            fix="raise compute.max_tokens_per_microbatch, or shorten prompts or candidates",
        )


def fit_candidates(group: Group, *, max_tokens: int, multiple: int) -> Iterator[Group]:
    """Split a group into as few groups as possible that fit into a micro-batch each.

    Each has the prompt and some of the candidates, in order. A group that fits is not split. This
    is for passes without gradients. Raises DataError if no split helps.
    """
    check_fits_in_parts(group, max_tokens, multiple, f"group {group.id!r}")
    capacity = microbatch_capacity(max_tokens, multiple) - len(group.prompt)
    taken: list[int] = []
    used = 0
    for number, candidate in enumerate(group.candidates):
        if used + len(candidate) > capacity:
            yield group.take(taken)
            taken, used = [], 0
        taken.append(number)
        used += len(candidate)
    yield group.take(taken)


def group_cost(group: Group, hidden_size: int = HIDDEN_SIZE) -> float:
    """Estimate the cost of one group in units of one token's linear FLOPs.

    It is (P + sum R) + b/a * (P^2 / 2 + sum(P R + R^2 / 2)): the linear layers for every token,
    causal attention in the prompt and in each candidate, and the attention of each candidate to its
    prompt. b/a = 1 / (6 H): a layer of width H spends 4 H FLOPs on a query-key pair and, with the
    usual 12 H^2 weights, 24 H^2 on the linear part of a token.
    """
    prompt = len(group.prompt)
    candidates = sum(candidate_cost(prompt, len(candidate), hidden_size) for candidate in group.candidates)
    return prompt_cost(prompt, hidden_size) + candidates


def prompt_cost(prompt: int, hidden_size: int) -> float:
    """Estimate the share of a prompt of `prompt` tokens in `group_cost`."""
    return prompt + prompt * prompt / 2 / (6 * hidden_size)


def candidate_cost(prompt: int, candidate: int, hidden_size: int) -> float:
    """Estimate the share of one candidate of `candidate` tokens in `group_cost`."""
    return candidate + candidate * (prompt + candidate / 2) / (6 * hidden_size)


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

    The plan depends on the arguments alone, so every rank may compute it for itself.
    data/oversized.py plans groups that exceed a micro-batch.

    Args:
        groups: groups that fit into a micro-batch each.
        data_size: number of data-parallel ranks.
        max_tokens: tokens in one micro-batch, padding included.
        multiple: number of tokens of which a micro-batch is a multiple.
        hidden_size: model width, for the estimate of costs.
        loads: cost of each rank's other work, in units of `group_cost`. Ranks with more of it get
            the cheaper micro-batches.

    Returns:
        [data rank][micro-batch] -> indices into `groups`, ascending. Each group occurs once. Every
        rank has the same number of micro-batches, as few as best-fit packing needs; some are empty
        if groups are few.

    Raises:
        ValueError: a group exceeds a micro-batch.
    """
    capacity = microbatch_capacity(max_tokens, multiple)
    for group in groups:
        if group.num_tokens > capacity:
            raise ValueError(f"group {group.id!r} has {group.num_tokens} tokens, a micro-batch {capacity}")
    plan: list[list[list[int]]] = [[] for _ in range(data_size)]
    load = list(loads or [0.0] * data_size)
    for start in range(0, max(1, len(groups)), WINDOW):
        window = groups[start : start + WINDOW]
        costs = [group_cost(group, hidden_size) for group in window]
        bins = _fill(costs, [group.num_tokens for group in window], data_size, capacity)
        for rank, microbatches in enumerate(_assign(bins, costs, load)):
            plan[rank] += [sorted(start + i for i in items) for items in microbatches]
    return plan


def _fill(costs: list[float], tokens: list[int], data_size: int, capacity: int) -> list[list[int]]:
    """Split the groups into a multiple of data_size bins within the capacity.

    Karmarkar-Karp balances best but ignores the capacity. If its bins overflow, the greedy rule is
    used, and if that finds no room, best-fit packing, whose bins are then nearly all full.
    """
    packed = best_fit(tokens, capacity)
    bins = max(1, -(-len(packed) // data_size)) * data_size
    balanced = _differencing(costs, bins)
    if all(sum(tokens[i] for i in items) <= capacity for items in balanced):
        return balanced
    return _least_loaded(costs, tokens, bins, capacity) or packed + [[] for _ in range(bins - len(packed))]


def best_fit(tokens: list[int], capacity: int) -> list[list[int]]:
    """Put items into bins, longest first, each into the fullest bin that has room or a new one."""
    plan: list[list[int]] = []
    free_bins: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for i in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        place = bisect_left(free_bins, (tokens[i], -1))
        if place == len(free_bins):
            free, chosen = capacity, len(plan)
            plan.append([])
        else:
            free, chosen = free_bins.pop(place)
        plan[chosen].append(i)
        insort(free_bins, (free - tokens[i], chosen))
    return plan


def _least_loaded(costs: list[float], tokens: list[int], bins: int, capacity: int) -> list[list[int]] | None:
    """Put items into bins, most expensive first, each into the cheapest bin that has room.

    Returns None if there is no room for an item.
    """
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
        """Compute the difference between the largest and the smallest bin, 0 for an absent bin."""
        return self.costs[0] - (self.costs[-1] if len(self.costs) == bins else 0.0)


def _differencing(costs: list[float], bins: int) -> list[list[int]]:
    """Divide items among bins, balanced by Karmarkar-Karp.

    The two partial plans of largest spread are joined, largest bins with smallest, until one is
    left.
    """
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
    """Join bin i of the first plan with bin (bins - 1 - i) of the second, both by descending cost.

    Absent bins are empty; `shared` is the number of pairs in which neither is.
    """
    shared = max(0, len(first.costs) + len(second.costs) - bins)
    alone, other = len(first.costs) - shared, len(second.costs) - shared
    merged = list(zip(first.costs[:alone], first.items[:alone], strict=True))
    merged += zip(second.costs[:other], second.items[:other], strict=True)
    for k in range(shared):
        i, j = alone + k, len(second.costs) - 1 - k
        merged.append((first.costs[i] + second.costs[j], first.items[i] + second.items[j]))
    merged.sort(key=lambda pair: (-pair[0], pair[1][0]))
    return _Partition([cost for cost, _ in merged], [items for _, items in merged])


def _assign(bins: list[list[int]], costs: list[float], load: list[float]) -> list[list[list[int]]]:
    """Give every rank the same number of bins, the most expensive first, to the least loaded rank.

    `load` is the cost of each rank's other work; the cost of its bins is added to it.
    """
    totals = [sum(costs[i] for i in items) for items in bins]
    per_rank = len(bins) // len(load)
    ranks: list[list[list[int]]] = [[] for _ in load]
    for b in sorted(range(len(bins)), key=lambda b: (-totals[b], b)):
        rank = min((r for r in range(len(load)) if len(ranks[r]) < per_rank), key=load.__getitem__)
        ranks[rank].append(bins[b])
        load[rank] += totals[b]
    return ranks
