"""A group in parts against the same group in one micro-batch: time of forward and backward, and
activation memory.

Split: `compute.max_tokens_per_microbatch` leaves room for the prompt and n candidates, so each part
has n of them (exo_megatron/training/oversized.py). A forward costs 1 and a backward 2, so with P +
K R tokens in one micro-batch the passes cost 3 (P + K R) and those of the parts R (K - n) more: at
most 4/3 of it. In memory are the prompt and one part: (P + n R) / (P + K R) of the activations.
Counted is what autograd keeps, and besides it the peak of all allocations, with gradients of
weights and temporary buffers. A step has several groups where they are small, one after another on
both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from exo_megatron.config.sections import ComputeConfig, LossConfig
from exo_megatron.data.groups import Group
from exo_megatron.diagnosis.memory import peak_bytes
from exo_megatron.diagnosis.timing import alternate
from exo_megatron.diagnosis.work import Lengths
from exo_megatron.training.optimizer import Trainee
from exo_megatron.training.step import plan_step
from tools.bench.models import Matched, Shape, hf_gradients, matched_models, random_groups, world
from tools.bench.options import Options
from tools.bench.saved import saved_bytes
from tools.bench.sides import agree
from tools.bench.table import Table
from tools.bench.training import OurSteps, backward

SHAPES = ((512, 128, 8, 1), (400, 50, 8, 1), (400, 50, 8, 4), (256, 256, 16, 1), (512, 512, 8, 1))
QUICK_SHAPES = ((24, 8, 4, 1), (5, 12, 4, 2))
SHAPE, QUICK_SHAPE = Shape(hidden=512, layers=4, vocab=512), Shape(hidden=64, layers=2, vocab=199, head_dim=16)
TOKENS, QUICK_TOKENS = 4096, 256
"""Approximate tokens of a step; at least one group."""
LOSS = LossConfig(kind="exo_rw", beta_pi=0.1, beta_r=1.0, temperature=0.8)
TOLERANCE = 1e-5
TIME_TARGET, MEMORY_TARGET = 1.36, 1.10


def run(options: Options) -> Table:
    """Run the benchmark. See the module."""
    shape = QUICK_SHAPE if options.quick else SHAPE
    rows = []
    whole = ComputeConfig(precision="fp32", max_tokens_per_microbatch=8192)
    with world() as runtime, matched_models(shape, runtime, whole) as matched:
        ours = OurSteps.of(matched, LOSS)
        for sizes in QUICK_SHAPES if options.quick else SHAPES:
            rows.append(_row(matched, ours, *sizes, quick=options.quick, rounds=options.rounds))
    return Table(
        "A group in parts of n candidates over the same group in one micro-batch, forward and backward",
        (
            "P, R, K",
            "n",
            "time",
            "work",
            "target",
            "activations",
            "(P+nR)/(P+KR)",
            "over the formula",
            "target",
            "peak allocated",
            "gradient difference",
        ),
        rows,
        (f"{shape}, fp32. Times: median (range) of ratios round by round. work: FLOPs of linear layers.",),
    )


@dataclass(frozen=True)
class Side:
    """Steps on the groups by `trainee`, whose limit decides whether a group is split."""

    trainee: Trainee
    ours: OurSteps
    groups: Sequence[Group]

    def step(self) -> None:
        """Run forward and backward of one step, planning included."""
        backward(self.trainee, self.groups, self.ours.objective)

    def gradients(self) -> dict[str, Tensor]:
        """Compute the gradient of the loss, by HF's names."""
        self.step()
        return hf_gradients(self.trainee, self.ours.matched)


def _with_limit(trainee: Trainee, tokens: int) -> Trainee:
    """Return the trainee with another compute.max_tokens_per_microbatch."""
    compute = trainee.policy.compute.model_copy(update={"max_tokens_per_microbatch": tokens})
    return replace(trainee, policy=replace(trainee.policy, compute=compute))


def _row(
    matched: Matched,
    ours: OurSteps,
    prompt: int,
    length: int,
    candidates: int,
    together: int,
    *,
    quick: bool,
    rounds: int,
) -> tuple[str, ...]:
    tokens, room = prompt + candidates * length, prompt + together * length
    lengths = [Lengths(prompt, (length,) * candidates)] * max(1, (QUICK_TOKENS if quick else TOKENS) // tokens)
    groups = ours.stored(random_groups(lengths, matched.spec.vocab_size))
    unsplit, split = (Side(_with_limit(ours.trainee, size), ours, groups) for size in (tokens, room))
    planned = plan_step(split.trainee, groups, ours.objective).oversized
    assert planned is not None
    parts = [assignment.parts for round_ in planned.rounds for assignment in round_.assignments]
    assert [{len(part) for part in each} for each in parts] == [{together}] * len(groups)
    difference = agree(split.gradients(), unsplit.gradients(), tolerance=TOLERANCE)
    timings = alternate({"split": split.step, "unsplit": unsplit.step}, rounds=rounds)
    saved = partial(saved_bytes, without=list(ours.trainee.policy.model.parameters()))
    kept = saved(split.step) / saved(unsplit.step)
    peak = peak_bytes(split.step) / peak_bytes(unsplit.step)
    formula = room / tokens
    work = 1 + (candidates - together) * length / (3 * tokens)
    return (
        f"{prompt}, {length}, {candidates}",
        f"{together}",
        timings.shown("split", "unsplit"),
        f"{work:.2f}",
        f"{TIME_TARGET:.2f}",
        f"{kept:.3f}",
        f"{formula:.3f}",
        f"{kept / formula:.2f}",
        f"{MEMORY_TARGET:.2f}",
        f"{peak:.3f}",
        f"{difference:.1e}",
    )
