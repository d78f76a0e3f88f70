"""The report says what the lengths of prompts and candidates mean for training, and what limits do to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exo_megatron.data.groups import Group, GroupLengths, StepSampler
from exo_megatron.data.oversized import plan_oversized
from exo_megatron.data.packing import HIDDEN_SIZE, group_cost, microbatch_capacity, plan_microbatches
from exo_megatron.utils.tables import render_table

Counts = npt.NDArray[np.int64]

QUANTILES = (0.1, 0.5, 0.9, 0.99)
BAR = 30
"""Characters of a bar that stands for everything."""
RANKS = (1, 8, 64)
"""Numbers of data-parallel ranks for which micro-batches are planned."""
PLANNED_GROUPS = 2048
"""Groups in the steps that are planned; more would take seconds and change little."""


@dataclass(frozen=True)
class LengthLimits:
    """Settings that lengths are compared with.

    Attributes:
        prompt: data.max_prompt_tokens.
        candidate: data.max_completion_tokens.
        microbatch: compute.max_tokens_per_microbatch.
        multiple: number of tokens of which a micro-batch is a multiple.
        groups: batch.groups, of one optimizer step.
    """

    prompt: int
    candidate: int
    microbatch: int
    multiple: int
    groups: int


def report_prompts(prompts: Counts, limit: int) -> list[str]:
    """Describe the lengths of G >= 1 prompts without candidates, line by line.

    prompts: tokens of each, [G]. limit: data.max_prompt_tokens.
    """
    lines = [f"{prompts.size:,} prompts, {prompts.sum():,} tokens", ""]
    lines += _tables({"prompt": prompts})
    lines += _limit("data.max_prompt_tokens", limit, "prompts", prompts, np.arange(prompts.size), prompts)
    return lines


def report_groups(lengths: GroupLengths, limits: LengthLimits) -> list[str]:
    """Describe the lengths of at least one group, line by line, and what the limits mean for them.

    Groups that exceed a limit on prompts or candidates, or a micro-batch with one candidate alone, are
    in the tables but not in the steps, because training refuses them.
    """
    tokens, owners = lengths.tokens, np.repeat(np.arange(lengths.prompts.size), lengths.counts)
    lines = [_size(lengths), ""]
    lines += _tables({"prompt": lengths.prompts, "candidate": lengths.candidates, "group": tokens})
    lines.append(_sharing(lengths))
    each = np.arange(lengths.prompts.size)
    lines += _limit("data.max_prompt_tokens", limits.prompt, "prompts", lengths.prompts, each, tokens)
    lines += _limit("data.max_completion_tokens", limits.candidate, "candidates", lengths.candidates, owners, tokens)
    return lines + _microbatches(lengths, limits)


def _size(lengths: GroupLengths) -> str:
    fewest, most = int(lengths.counts.min()), int(lengths.counts.max())
    candidates = f"K = {fewest}" if fewest == most else f"K = {fewest} to {most}"
    return (
        f"{lengths.prompts.size:,} groups, {lengths.candidates.size:,} candidates ({candidates}), "
        f"{lengths.tokens.sum():,} tokens"
    )


def _tables(columns: dict[str, Counts]) -> list[str]:
    """Lay out quantiles of the columns, and a histogram whose bins end at powers of two."""
    header = ["tokens of a", "min", *(f"{q:.0%}" for q in QUANTILES), "max", "mean"]
    lines = [
        [
            name,
            f"{values.min():,}",
            *(f"{quantile(values, q):,}" for q in QUANTILES),
            f"{values.max():,}",
            f"{values.mean():,.1f}",
        ]
        for name, values in columns.items()
    ]
    histogram = [[label, *map(_bar, shares)] for label, shares in doubling_histogram(list(columns.values()))]
    tables = (render_table(header, lines, indent=2), render_table(["tokens", *columns], histogram, indent=2))
    return [line for table in tables for line in (*table.splitlines(), "")]


def quantile(values: Counts, share: float) -> int:
    """Find the smallest of the values that at least this share of them does not exceed."""
    return int(np.quantile(values, share, method="inverted_cdf"))


def doubling_histogram(columns: Sequence[Counts]) -> list[tuple[str, list[float]]]:
    """Count positive values of each column in bins 1, 2, 3-4, 5-8 and so on.

    Returns the range of each bin and the shares of each column in it, from the first bin that has
    values to the last.
    """
    last = max(int(values.max()) for values in columns)
    ends = 2 ** np.arange((last - 1).bit_length() + 1)
    counts = [np.bincount(np.searchsorted(ends, values), minlength=ends.size) for values in columns]
    used = np.flatnonzero(np.sum(counts, axis=0))
    return [
        (_range(int(ends[i])), [float(count[i] / values.size) for count, values in zip(counts, columns, strict=True)])
        for i in range(int(used[0]), int(used[-1]) + 1)
    ]


def _range(end: int) -> str:
    return f"{end:,}" if end <= 2 else f"{end // 2 + 1:,}-{end:,}"


def _bar(share: float) -> str:
    return f"{share:6.1%} {'#' * round(BAR * share)}".rstrip()


def _sharing(lengths: GroupLengths) -> str:
    own = int(lengths.candidates.sum())
    shared, separate = int(lengths.prompts.sum()) + own, int(lengths.prompts @ lengths.counts) + own
    return (
        f"shared prompts: {shared:,} tokens instead of {separate:,} in one sequence per candidate "
        f"({1 - shared / separate:.1%} fewer)"
    )


def _limit(key: str, limit: int, noun: str, values: Counts, owners: Counts, tokens: Counts) -> list[str]:
    """Tell what exceeds a limit, and what a limit that the longest one in a hundred exceeds would leave out.

    Args:
        key: the setting.
        limit: its value.
        noun: what the values are lengths of.
        values: tokens of each, [N].
        owners: the group of each, [N].
        tokens: tokens of each group, [G].
    """
    if (values > limit).any():
        lines = [f"{key} = {limit:,}: {_beyond(limit, noun, values, owners, tokens)}"]
    else:
        lines = [f"{key} = {limit:,}: all {noun} fit, the longest with {values.max():,}"]
    lower = quantile(values, 0.99)
    if lower < min(limit, int(values.max())):
        lines.append(f"  at {lower:,}: {_beyond(lower, noun, values, owners, tokens)}")
    return lines


def _beyond(limit: int, noun: str, values: Counts, owners: Counts, tokens: Counts) -> str:
    longer = values > limit
    share = tokens[np.unique(owners[longer])].sum() / tokens.sum()
    return f"longer are {_part(longer, noun)}, in records with {share:.2%} of all tokens"


def _part(chosen: npt.NDArray[np.bool_], noun: str) -> str:
    return f"{chosen.sum():,} of {chosen.size:,} {noun} ({chosen.mean():.2%})"


def _microbatches(lengths: GroupLengths, limits: LengthLimits) -> list[str]:
    """Tell how groups fill micro-batches, and what those cost that exceed one."""
    tokens, capacity = lengths.tokens, microbatch_capacity(limits.microbatch, limits.multiple)
    outside = lengths.longest > capacity
    within = ~outside & (lengths.prompts <= limits.prompt)
    owners = np.repeat(np.arange(within.size), lengths.counts)
    within[owners[lengths.candidates > limits.candidate]] = False
    large = within & (tokens > capacity)
    lines = [
        f"compute.max_tokens_per_microbatch = {limits.microbatch:,}: the largest group has {tokens.max():,} tokens"
    ]
    if outside.any():
        lines.append(f"  its prompt and one candidate exceed it: {_part(outside, 'groups')}, which are refused")
    if not within.any():
        return lines
    steps = _steps(lengths, np.flatnonzero(within), limits.groups)
    if large.any():
        lines.append(f"  exceed it: {_part(large, 'groups')}, which are trained on in parts")
        added, large_factor = _parts(lengths, np.flatnonzero(large), limits)
        cost = sum(group_cost(group) for step in steps for group in step) / sum(map(len, steps)) * within.sum()
        factors = f"they cost {large_factor:.2f} times as much for that, all groups {1 + added / cost:.3f} times"
        lines.append(f"  {factors} (a model {HIDDEN_SIZE:,} wide)")
    mean = sum(group.num_tokens for step in steps for group in step) / len(steps)
    lines.append(f"batch.groups = {limits.groups:,}: {mean:,.0f} tokens in a step")
    return lines + [_filling(steps, limits, ranks) for ranks in RANKS if ranks <= limits.groups]


def _steps(lengths: GroupLengths, within: npt.NDArray[np.intp], groups: int) -> list[list[Group]]:
    """Make groups for some shuffled steps over the groups `within` the limits."""
    sampler = StepSampler(within.size, groups_per_step=groups, epochs=1, max_steps=None, seed=0)
    steps = min(sampler.total_steps, max(1, PLANNED_GROUPS // groups))
    return [_groups(lengths, within[sampler.indices(step)]) for step in range(steps)]


def _groups(lengths: GroupLengths, numbers: npt.NDArray[np.intp]) -> list[Group]:
    """Make groups of zeros with the lengths of those with these numbers."""
    starts = lengths.starts
    groups = []
    for number in numbers.tolist():
        candidates = lengths.candidates[starts[number] : starts[number + 1]].tolist()
        groups.append(
            Group(str(number), (0,) * int(lengths.prompts[number]), tuple((0,) * each for each in candidates))
        )
    return groups


def _parts(lengths: GroupLengths, large: npt.NDArray[np.intp], limits: LengthLimits) -> tuple[float, float]:
    """Estimate what parts add to the cost of the groups `large`, and by what factor they cost more.

    Some of them are planned, evenly spaced.
    """
    planned = _groups(lengths, large[:: -(-large.size // PLANNED_GROUPS)])
    plan = plan_oversized(planned, data_size=1, max_tokens=limits.microbatch, multiple=limits.multiple)
    plain = sum(map(group_cost, planned))
    added = sum(plan.loads) - plain
    return added / len(planned) * large.size, 1 + added / plain


def _filling(steps: list[list[Group]], limits: LengthLimits, ranks: int) -> str:
    """Plan the micro-batches of the steps on a number of data-parallel ranks."""
    capacity = microbatch_capacity(limits.microbatch, limits.multiple)
    microbatches = tokens = 0
    for step in steps:
        oversized = plan_oversized(step, data_size=ranks, max_tokens=limits.microbatch, multiple=limits.multiple)
        ordinary = [step[i] for i in oversized.ordinary]
        plan = plan_microbatches(
            ordinary, data_size=ranks, max_tokens=limits.microbatch, multiple=limits.multiple, loads=oversized.loads
        )
        microbatches += sum(map(len, plan))
        tokens += sum(group.num_tokens for group in ordinary)
    return (
        f"  on {ranks} data-parallel rank{'s' * (ranks > 1)}: {microbatches / len(steps) / ranks:.1f} "
        f"micro-batches of a rank and step, {tokens / microbatches / capacity:.0%} full"
    )
