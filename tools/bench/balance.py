"""Makespan of the 1F1B schedule with groups spread by our packer, and at random.

Simulated are 4 data-parallel copies of a 7B Llama on 4 pipeline stages each, with about 8
micro-batches per copy and step. The plan is the packer's own (`plan_microbatches`). The durations
are FLOPs of what lies in a micro-batch: linear layers, attention over the pairs that exist, and on
the last pipeline stage the vocabulary projection of the predicting tokens. A step ends when the
last copy has finished. `ideal` is the same work in equal micro-batches through the same schedule,
its bubble included.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from exo_megatron.data.groups import Group
from exo_megatron.data.packing import plan_microbatches
from exo_megatron.diagnosis.work import Lengths
from tools.bench.lengths import HH, TLDR, Distribution
from tools.bench.options import Options
from tools.bench.schedule import Durations, makespan
from tools.bench.sides import Different
from tools.bench.table import Table

STAGES, COPIES, MICROBATCHES = 4, 4, 8
CANDIDATES, STEPS, GROUPS = (2, 4, 8), 20, (64, 256)
TARGET, TARGET_CANDIDATES = 1.05, 4
Plan = Sequence[Sequence[Sequence[int]]]
"""Plan of a step: [copy][micro-batch] -> groups."""


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama whose layers are dealt to the pipeline stages in equal numbers."""

    hidden: int = 4096
    layers: int = 32
    ffn: int = 11008
    vocab: int = 32_000

    def durations(self, groups: Sequence[Group]) -> Durations:
        """Compute the durations of a micro-batch of these groups, in FLOPs.

        A backward pass costs twice the forward pass, three times where logits are recomputed.
        """
        tokens = sum(group.num_tokens for group in groups)
        pairs = sum(_pairs(group) for group in groups)
        rows = sum(1 + sum(len(candidate) - 1 for candidate in group.candidates) for group in groups)
        per_layer = 2 * (4 * self.hidden**2 + 3 * self.hidden * self.ffn) * tokens + 4 * self.hidden * pairs
        stage = per_layer * self.layers / STAGES
        head = 2 * self.hidden * self.vocab * rows
        others = STAGES - 1
        return Durations((stage,) * others + (stage + head,), (2 * stage,) * others + (2 * stage + 3 * head,))


def run(options: Options) -> Table:
    """Run the benchmark. See the module."""
    model, steps = Model(), 2 if options.quick else STEPS
    rows = []
    for lengths in (HH, TLDR):
        for candidates in CANDIDATES:
            for count in GROUPS[:1] if options.quick else GROUPS:
                drawn = [_groups(lengths.draw(count, candidates, seed=step)) for step in range(steps)]
                rows.append((lengths.name, str(candidates), str(count), *_measure(model, drawn, lengths, candidates)))
    return Table(
        f"Makespan of 1F1B over its ideal, {STAGES} stages, {COPIES} copies",
        ("lengths", "K", "groups a step", "max tokens", "micro-batches", "random", "ours", "worst step", "target"),
        rows,
        (
            f"Simulated from the FLOPs of a {model}. Mean of {steps} steps; `worst step` is of ours.",
            f"max tokens: the fewest, in steps of 64, with which no step needs more than {MICROBATCHES} micro-batches "
            "a copy. random: groups shuffled and dealt in equal numbers to as many micro-batches.",
            "ideal: equal micro-batches in the same schedule. Unequal ones may beat it slightly, because ours begin "
            "with the most expensive.",
        ),
    )


def _groups(lengths: Sequence[Lengths]) -> list[Group]:
    return [
        Group(f"group-{i}", (0,) * each.prompt, tuple((0,) * length for length in each.candidates))
        for i, each in enumerate(lengths)
    ]


def _pairs(group: Group) -> float:
    """Count the query-key pairs that are computed."""
    prompt = len(group.prompt)
    return prompt**2 / 2 + sum(len(each) * (prompt + len(each) / 2) for each in group.candidates)


def _measure(model: Model, steps: Sequence[list[Group]], lengths: Distribution, candidates: int) -> tuple[str, ...]:
    """Make the cells of one table row, from max tokens on."""
    max_tokens, plans = _tightest(model, steps)
    ours, shuffled = [], []
    for number, (groups, plan) in enumerate(zip(steps, plans, strict=True)):
        best = ideal(model, plan, groups)
        other = random_plan(len(groups), len(plan[0]), random.Random(number))
        ours.append(step_time(model, plan, groups) / best)
        shuffled.append(step_time(model, other, groups) / best)
    counts = sorted({len(plan[0]) for plan in plans})
    return (
        str(max_tokens),
        "-".join(str(count) for count in (counts[0], counts[-1])[: len(counts)]),
        f"{statistics.mean(shuffled):.3f}",
        f"{statistics.mean(ours):.3f}",
        f"{max(ours):.3f}",
        f"{TARGET}" if candidates == TARGET_CANDIDATES else "",
    )


def _tightest(model: Model, steps: Sequence[list[Group]]) -> tuple[int, list[Plan]]:
    """Find the shortest micro-batch with which no step needs more than MICROBATCHES of them per
    copy, and the plans.
    """
    unit = 64
    longest = max(group.num_tokens for groups in steps for group in groups)
    fullest = max(sum(group.num_tokens for group in groups) for groups in steps) // (COPIES * MICROBATCHES)
    size = -(-max(longest, fullest) // unit) * unit
    while True:
        plans: list[Plan] = [
            plan_microbatches(groups, data_size=COPIES, max_tokens=size, multiple=1, hidden_size=model.hidden)
            for groups in steps
        ]
        if all(len(plan[0]) <= MICROBATCHES for plan in plans):
            return size, plans
        size += unit


def random_plan(groups: int, microbatches: int, generator: random.Random) -> Plan:
    """Shuffle groups and deal them in equal numbers (they differ by one at most) to that many
    micro-batches per copy.
    """
    order = generator.sample(range(groups), groups)
    dealt = [order[start :: COPIES * microbatches] for start in range(COPIES * microbatches)]
    return [dealt[copy::COPIES] for copy in range(COPIES)]


def step_time(model: Model, plan: Plan, groups: Sequence[Group]) -> float:
    """Compute the time at which the last copy has finished.

    Raises Different if the plan does not have each group once.
    """
    planned = sorted(i for copy in plan for microbatch in copy for i in microbatch)
    if planned != list(range(len(groups))):
        raise Different(f"a plan of {len(planned)} groups, some of them not once, for {len(groups)} groups")
    return max(makespan([model.durations([groups[i] for i in microbatch]) for microbatch in copy]) for copy in plan)


def ideal(model: Model, plan: Plan, groups: Sequence[Group]) -> float:
    """Compute the time of the same work in the same number of micro-batches, all of them equal."""
    count = sum(len(copy) for copy in plan)
    whole = model.durations(groups)
    share = Durations(tuple(f / count for f in whole.forward), tuple(b / count for b in whole.backward))
    return makespan([share] * len(plan[0]))
