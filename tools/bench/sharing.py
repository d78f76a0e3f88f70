"""Prompt sharing on and off, against the formula of what it saves.

On: a group is `[prompt | y_1 | ... | y_K]`. Off: the same code with every candidate a group of its
own, its prompt repeated. The objective is a weighted likelihood, which both compute exactly;
forward and backward are timed. With `a` linear FLOPs of a token and `b` FLOPs of a query-key pair
the work differs by the factor

    [ a K (P+R) + b K (P+R)^2 / 2 ] / [ a (P + K R) + b ( P^2/2 + K (P R + R^2/2) ) ]

The vocabulary is small, because the formula leaves the head out, which has the same positions on
both sides. The model is wide and has one layer: the formula counts FLOPs, of which attention on a
CPU needs several times as long as matrix products, and the wider a model, the smaller the share of
attention. (A 7B Llama is twice as wide, with heads of the same 128.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from exo_megatron.config.sections import ComputeConfig, LossConfig
from exo_megatron.data.groups import Group
from exo_megatron.diagnosis.likelihood import WeightedLikelihood, unshared
from exo_megatron.diagnosis.timing import alternate
from exo_megatron.diagnosis.work import Lengths, separate_work, shared_work
from tools.bench.models import Matched, Shape, hf_gradients, matched_models, random_groups, world
from tools.bench.options import Options
from tools.bench.sides import agree
from tools.bench.table import Table
from tools.bench.training import OurSteps, backward

SHAPES = ((47, 230, 4), (400, 50, 4), (400, 50, 8), (512, 512, 4), (1024, 128, 8), (2048, 256, 8))
QUICK_SHAPES = ((12, 20, 4), (40, 5, 8))
SHAPE = Shape(hidden=2048, layers=1, vocab=512, head_dim=128)
QUICK_SHAPE = Shape(hidden=64, layers=2, vocab=199, head_dim=16)
TOKENS = 4096
"""Approximate tokens of a step, prompts shared; at least one group."""
TOLERANCE = 1e-5
TARGET = 0.98


def run(options: Options) -> Table:
    """Run the benchmark. See the module."""
    shape = QUICK_SHAPE if options.quick else SHAPE
    rows: list[tuple[str, ...]] = []
    compute = ComputeConfig(precision="fp32", max_tokens_per_microbatch=8192)
    with world() as runtime, matched_models(shape, runtime, compute) as matched:
        sides = Sides(matched)
        for prompt, length, candidates in QUICK_SHAPES if options.quick else SHAPES:
            count = max(1, TOKENS // (prompt + candidates * length))
            groups = random_groups([Lengths(prompt, (length,) * candidates)] * count, shape.vocab)
            alone = unshared(groups)
            difference = agree(sides.gradients(groups), sides.gradients(alone), tolerance=TOLERANCE)
            both = {"off": partial(sides.step, alone), "on": partial(sides.step, groups)}
            timings = alternate(both, rounds=options.rounds, warmup=0)  # both have just run
            ideal = formula(shape, prompt, length, candidates)
            reached = timings.ratio("off", "on") / ideal
            cells = (timings.shown("off", "on"), f"{ideal:.2f}", f"{reached:.1%}", f"{TARGET:.0%}", f"{difference:.1e}")
            rows.append((f"{prompt}, {length}, {candidates}", *cells))
    return Table(
        "Prompt sharing: separate sequences over shared prompts, forward and backward",
        ("P, R, K", "off / on", "formula", "reached", "target", "gradient difference"),
        rows,
        (f"{shape}, fp32, about {TOKENS} tokens a step. Median (range) of ratios round by round.",),
    )


def formula(shape: Shape, prompt: int, length: int, candidates: int) -> float:
    """Compute the ratio of the work without sharing to the work with it, in FLOPs without the
    head's.
    """
    model, groups = replace(shape.size, head=0), [Lengths(prompt, (length,) * candidates)]
    return separate_work(groups).flops(model) / shared_work(groups, response_only=True).flops(model)


class Sides:
    """Training steps of the policy under a weighted likelihood."""

    def __init__(self, matched: Matched) -> None:
        self.matched = matched
        self.ours = OurSteps.of(matched, LossConfig())

    def step(self, groups: Sequence[Group]) -> None:
        """Run forward and backward of one step."""
        backward(self.ours.trainee, groups, WeightedLikelihood())

    def gradients(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Compute the gradient of the weighted likelihood, by HF's names."""
        self.step(groups)
        return hf_gradients(self.ours.trainee, self.matched)
