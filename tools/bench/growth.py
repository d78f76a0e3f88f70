"""Growth of the cost of a training step with K, prompt length, vocabulary and number of groups.

Forward and backward of a weighted likelihood, which is computed exactly alike from a group and from
the same candidates in separate sequences; gradients of both are compared. Measured are time, and peak
memory beyond weights and gradients; each of the four sweeps has a picture. `separate sequences` is the
same code with every candidate as a group of its own, its prompt repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from exo_megatron.config.sections import ComputeConfig
from exo_megatron.data.groups import Group
from exo_megatron.diagnosis.likelihood import unshared
from exo_megatron.diagnosis.memory import peak_bytes
from exo_megatron.diagnosis.timing import alternate
from exo_megatron.diagnosis.work import Lengths
from exo_megatron.parallel.runtime import Runtime
from tools.bench.models import Shape, matched_models, random_groups, world
from tools.bench.options import Options
from tools.bench.pictures import Line, Panel, draw_panels
from tools.bench.sharing import Sides
from tools.bench.sides import agree
from tools.bench.table import Table

TOLERANCE = 1e-5
OURS, SEPARATE = "prompt shared", "separate sequences"


@dataclass(frozen=True)
class Point:
    """One training step: this many equal groups through a model of this shape."""

    shape: Shape
    prompt: int = 256
    length: int = 64
    candidates: int = 4
    groups: int = 1
    max_tokens: int = 8192

    def drawn(self) -> list[Group]:
        """Draw the groups, with random tokens and weights."""
        return random_groups([Lengths(self.prompt, (self.length,) * self.candidates)] * self.groups, self.shape.vocab)


@dataclass(frozen=True)
class Sweep:
    """Steps that differ in one thing. separate: separate sequences are timed too, and not only
    compared once.
    """

    name: str
    x_label: str
    title: str
    points: Sequence[tuple[int, Point]]
    separate: bool = False


@dataclass(frozen=True)
class Cost:
    """Seconds (median) and bytes of a side."""

    seconds: float
    peak: int


@dataclass(frozen=True)
class Measurement:
    """Costs of each side at a point, and the difference of their gradients where both were
    computed.
    """

    costs: dict[str, Cost]
    difference: float | None


def run(options: Options) -> Table:
    """Run the benchmark. See the module."""
    rows: list[tuple[str, ...]] = []
    base = Point(Shape(hidden=256, layers=4, vocab=8192))
    sweeps = quick_sweeps() if options.quick else full_sweeps(base)
    with world() as runtime:
        for sweep in sweeps:
            measured = measure(sweep, runtime, options)
            draw(sweep, measured, options)
            rows += [_cells(sweep, i, measured) for i in range(len(measured))]
    return Table(
        "Cost of a training step, forward and backward",
        (
            "",
            "tokens",
            "s",
            "of the line above",
            "separate sequences",
            "MiB",
            "separate sequences",
            "gradient difference",
        ),
        rows,
        (
            f"{base.shape}, fp32; one group of P={base.prompt}, R={base.length}, K={base.candidates}, but for what "
            "varies. s, MiB: with the prompt shared; separate sequences: relative to it.",
            "Where the number of groups varies, a micro-batch holds two of them.",
        ),
    )


def full_sweeps(base: Point) -> list[Sweep]:
    """List the sweeps at full size."""
    prompt, candidates = f"prompt of {base.prompt} tokens", f"{base.candidates} candidates of {base.length}"
    vocabularies = (8192, 32_768, 65_536, 131_072)
    two_groups = 2 * (base.prompt + base.candidates * base.length)
    return [
        Sweep("K", "K, candidates of the group", f"One group: {prompt}, candidates of {base.length}",
              [(k, replace(base, candidates=k)) for k in (1, 2, 4, 8, 16)], separate=True),
        Sweep("prompt", "P, tokens of the prompt", f"One group: {candidates} tokens",
              [(p, replace(base, prompt=p)) for p in (64, 256, 512, 1024)], separate=True),
        Sweep("vocabulary", "V, tokens of the vocabulary", f"One group: {prompt}, {candidates}",
              [(v, replace(base, shape=replace(base.shape, vocab=v))) for v in vocabularies]),
        Sweep("groups", "groups of a step, two in a micro-batch", f"Groups: {prompt}, {candidates}",
              [(n, replace(base, groups=n, max_tokens=two_groups)) for n in (1, 2, 4, 8)]),
    ]  # fmt: skip


def quick_sweeps() -> list[Sweep]:
    """List the same sweeps at small sizes."""
    base = Point(Shape(hidden=64, layers=2, vocab=199, head_dim=16), prompt=20, length=8, candidates=3)
    other = replace(base, shape=replace(base.shape, vocab=311))
    return [
        Sweep("K", "K", "quick", [(k, replace(base, candidates=k)) for k in (1, 3)], separate=True),
        Sweep("vocabulary", "V", "quick", [(199, base), (311, other)]),
        Sweep("groups", "groups", "quick", [(n, replace(base, groups=n, max_tokens=44)) for n in (1, 2)]),
    ]


def measure(sweep: Sweep, runtime: Runtime, options: Options) -> list[Measurement]:
    """Measure all points of a sweep, those that share a model in turn; in the order of the
    sweep.
    """
    measured: list[Measurement] = []
    points = [point for _, point in sweep.points]
    models = dict.fromkeys((point.shape, point.max_tokens) for point in points)
    for shape, max_tokens in models:
        own = [point for point in points if (point.shape, point.max_tokens) == (shape, max_tokens)]
        compute = ComputeConfig(precision="fp32", max_tokens_per_microbatch=max_tokens)
        with matched_models(shape, runtime, compute) as matched:
            measured += _measure_points(Sides(matched), own, sweep.separate, options.rounds)
    return measured


def _measure_points(sides: Sides, points: Sequence[Point], separate: bool, rounds: int) -> list[Measurement]:
    work = {(i, OURS): point.drawn() for i, point in enumerate(points)}
    others = {(i, SEPARATE): unshared(point.drawn()) for i, point in enumerate(points)}
    differences: dict[int, float] = {}
    for i in range(len(points)) if separate else range(1):
        ours, theirs = (sides.gradients(groups) for groups in (work[i, OURS], others[i, SEPARATE]))
        differences[i] = agree(ours, theirs, tolerance=TOLERANCE)
    if separate:
        work |= others
    named = {f"{i} {side}": partial(sides.step, groups) for (i, side), groups in work.items()}
    timings = alternate(named, rounds=rounds)
    peaks = {name: peak_bytes(step) for name, step in named.items()}
    return [
        Measurement(
            {
                side: Cost(timings.median(f"{i} {side}"), peaks[f"{i} {side}"])
                for side in ((OURS, SEPARATE) if separate else (OURS,))
            },
            differences.get(i),
        )
        for i in range(len(points))
    ]


def draw(sweep: Sweep, measured: Sequence[Measurement], options: Options) -> None:
    """Draw time and memory side by side."""
    x = [value for value, _ in sweep.points]
    sides = list(measured[0].costs)
    seconds = [Line(side, x, [each.costs[side].seconds for each in measured]) for side in sides]
    mebibytes = [Line(side, x, [each.costs[side].peak / 2**20 for each in measured]) for side in sides]
    panels = (Panel("forward and backward, s", seconds), Panel("peak memory, MiB", mebibytes))
    name = f"{'quick-' if options.quick else ''}growth-{sweep.name.lower()}.png"
    draw_panels(options.pictures / name, sweep.title, sweep.x_label, panels)


def _cells(sweep: Sweep, index: int, measured: Sequence[Measurement]) -> tuple[str, ...]:
    value, point = sweep.points[index]
    cost, other = measured[index].costs[OURS], measured[index].costs.get(SEPARATE)
    difference = measured[index].difference
    return (
        f"{sweep.name} {value}",
        str(sum(group.num_tokens for group in point.drawn())),
        f"{cost.seconds:.3f}",
        f"{cost.seconds / measured[index - 1].costs[OURS].seconds:.2f}" if index else "",
        f"{other.seconds / cost.seconds:.2f}" if other else "",
        f"{cost.peak / 2**20:.1f}",
        f"{other.peak / cost.peak:.2f}" if other else "",
        f"{difference:.1e}" if difference is not None else "",
    )
