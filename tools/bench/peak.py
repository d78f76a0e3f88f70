"""Share of the machine's own matrix-multiply peak that a training step reaches.

Peak: square matrix products in the precision of the step, repeated for four seconds and more in
turn with it, of the size that is fastest over all rounds. (A single product is too short to be
slowed down by the machine's other programs, which do slow down a step.) The step is a whole one
(packing, forward, backward, reduction, Adam) on groups of the HH-like and TL;DR-like lengths with
stored reference log-probs. Its FLOPs are those of the model on the packed sequence: 6 per weight of
a decoder matrix and token, 6 per weight of the head and predicting token, 12 H per layer and
visible query-key pair. Recomputation is not counted, nor norms, activations, softmax and Adam.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch

from exo_megatron.config.sections import ComputeConfig, LossConfig
from exo_megatron.data.groups import Group
from exo_megatron.diagnosis.machine import SquareProducts
from exo_megatron.diagnosis.timing import alternate
from exo_megatron.diagnosis.work import Lengths, shared_work
from tools.bench.lengths import HH, TLDR, Distribution
from tools.bench.models import Shape, matched_models, random_groups, world
from tools.bench.options import Options
from tools.bench.table import Table
from tools.bench.training import OurSteps

LOSS = LossConfig(kind="exo_rw", beta_pi=0.5, temperature=0.8)
CANDIDATES = 4
TOKENS = 4096
TARGET = 0.85
QUICK_SHAPE = Shape(hidden=64, layers=2, vocab=199, head_dim=16)
CPU_SHAPES = tuple(Shape(hidden, layers, vocab=32_000) for hidden, layers in ((512, 4), (1024, 4), (2048, 2)))
CUDA_SHAPES = (Shape(hidden=4096, layers=8, vocab=32_000, head_dim=128),)


def run(options: Options) -> Table:
    """Run the benchmark. See the module."""
    shapes = CUDA_SHAPES if torch.cuda.is_available() else CPU_SHAPES
    rows: list[tuple[str, ...]] = []
    precision: Literal["bf16", "fp32"] = "bf16" if torch.cuda.is_available() else "fp32"
    compute = ComputeConfig(precision=precision, max_tokens_per_microbatch=8192)
    with world() as runtime:
        for shape in (QUICK_SHAPE,) if options.quick else shapes:
            with matched_models(shape, runtime, compute) as matched:
                ours = OurSteps.of(matched, LOSS)
                for lengths in (HH, TLDR):
                    groups = ours.stored(random_groups(draw(lengths, 512 if options.quick else TOKENS), shape.vocab))
                    rows.append(_row(shape, lengths, ours, groups, options))
    return Table(
        "Share of the matrix-multiply peak that a training step reaches",
        ("model", "lengths", "tokens", "step, s", "step, TFLOP/s", "peak, TFLOP/s", "share", "target"),
        rows,
        (f"{precision}, EXO_rw, K={CANDIDATES}, stored reference log-probs. Median (range) of shares round by round.",),
    )


def draw(lengths: Distribution, tokens: int) -> list[Lengths]:
    """Draw lengths of groups of about so many tokens."""
    drawn: list[Lengths] = []
    count = 0
    for each in lengths.draw(tokens // 100, CANDIDATES):
        if count >= tokens:
            break
        drawn.append(each)
        count += each.prompt + sum(each.candidates)
    return drawn


def step_flops(shape: Shape, groups: Sequence[Group]) -> float:
    """Count the FLOPs of a step. See the module."""
    work = shared_work([Lengths.of(group) for group in groups], response_only=True)
    return work.step_flops(shape.size, live=False)


def _row(
    shape: Shape, lengths: Distribution, ours: OurSteps, groups: Sequence[Group], options: Options
) -> tuple[str, ...]:
    sizes = (256,) if options.quick else (8192,) if torch.cuda.is_available() else (1024, 2048)
    dtype, device = ours.matched.hf.dtype, ours.matched.topology.device
    seconds = 0.05 if options.quick else 4.0
    products = {f"{size}": SquareProducts.of(size, dtype, device, seconds=seconds) for size in sizes}
    timings = alternate({"step": partial(ours.step, groups), **products}, rounds=options.rounds)
    best = max(products, key=lambda size: products[size].flops / timings.median(size))
    peaks = [products[best].flops / seconds for seconds in timings.seconds[best]]
    steps = [step_flops(shape, groups) / seconds for seconds in timings.seconds["step"]]
    shares = [step / peak for step, peak in zip(steps, peaks, strict=True)]
    return (
        f"H={shape.hidden}, {shape.layers} layers, V={shape.vocab}",
        lengths.name,
        str(sum(group.num_tokens for group in groups)),
        f"{timings.median('step'):.2f}",
        f"{statistics.median(steps) / 1e12:.3f}",
        f"{statistics.median(peaks) / 1e12:.3f}",
        f"{statistics.median(shares):.1%} ({min(shares):.1%}-{max(shares):.1%})",
        f"{TARGET:.0%}",
    )
