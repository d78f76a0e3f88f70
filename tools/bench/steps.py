"""A training step against what people use today, and what each of our ideas is worth in it.

For K = 2, 4, 8 and 32 candidates a prompt and for two kinds of lengths, one optimizer step on the
same weights and groups:

    HF        an HF model with the loss written out (hf_peer.py)
    TRL       DPOTrainer(loss_type="exo_pair"), where K = 2 (trl_peer.py)
    ours      with its ideas switched on in turn: first a plain step, one sequence per candidate

Peers run at the fastest of their settings, which is found on the same groups. Every side takes the
gradient of the same loss, which is compared first. The model is small but has the proportions of a
large one: its output layer has the share of the work that a Llama 2 7B's has.

The formula counts FLOPs (work.py). "time / formula" is our time over what the formula makes of the
time of our plain step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from exo_megatron.config.sections import ComputeConfig, LossConfig
from exo_megatron.data.groups import Group
from exo_megatron.diagnosis.timing import Clock, Timings, alternate, choose_clock
from exo_megatron.diagnosis.work import Lengths, ModelSize
from exo_megatron.parallel.runtime import Runtime
from tools.bench.counting import counted
from tools.bench.hf_peer import StraightforwardLoss
from tools.bench.lengths import HH, TLDR
from tools.bench.models import Shape, matched_models, random_groups, world
from tools.bench.options import Options
from tools.bench.peer import Peer, PeerSteps
from tools.bench.pictures import Bars, draw_bars
from tools.bench.sides import agree
from tools.bench.table import Record, Table
from tools.bench.training import OurSteps
from tools.bench.trl_peer import TrlTrainer
from tools.bench.variants import Variant
from tools.bench.work import MODELS, PACKING, PLAIN, RESPONSE_ONLY, SHARING, STORED, Rung, padded_work, waterfall

PAIR = LossConfig(kind="exo_pref", beta_pi=0.1, label_smoothing=1e-3, temperature=1.0)  # TRL has no temperature
REWARDS = LossConfig(kind="exo_rw", beta_pi=0.5, beta_r=1.0, temperature=0.8)
SHAPE, QUICK_SHAPE = Shape(hidden=512, layers=3, vocab=384), Shape(hidden=192, layers=2, vocab=256)
CELLS = tuple((lengths, k, count) for lengths in (HH, TLDR) for k, count in ((2, 4), (4, 2), (8, 1), (32, 1)))
"""Lengths, K, and groups of a step: few, because a step of the peer takes ten seconds."""
QUICK_CELLS = ((HH, 2, 2), (TLDR, 8, 1))
SLOW = 32
"""K from which on a side is timed in at most SLOW_ROUNDS rounds."""
SLOW_ROUNDS = 3
SWITCHES = {
    PLAIN: {"shared": False, "packed": False},
    SHARING: {"shared": True, "packed": False},
    PACKING: {"shared": True, "packed": True},
}
COMPUTE = ComputeConfig(precision="fp32", max_tokens_per_microbatch=8192)
TOLERANCE = 1e-4
TARGET = 1.05
COLUMNS = ("lengths", "K", "step", "tokens", "projected", "s", "HF / this", "formula", "7B", "8B", "time / formula")


def run(options: Options) -> Table:
    """Run the benchmark. See the module."""
    shape = QUICK_SHAPE if options.quick else SHAPE
    cells: list[Cell] = []
    with world() as runtime:
        for lengths, candidates, count in QUICK_CELLS if options.quick else CELLS:
            rounds = options.rounds if candidates < SLOW else min(options.rounds, SLOW_ROUNDS)
            groups = random_groups(lengths.spread(count, candidates), shape.vocab)
            clock = choose_clock(quick=options.quick)
            cells.append(Cell.measure(lengths.name, groups, shape, runtime, rounds=rounds, clock=clock))
            print(f"{cells[-1].title}: {cells[-1].summary()}", flush=True)
    prefix = "quick-" if options.quick else ""
    draw_bars(
        options.pictures / f"{prefix}steps.png",
        "A training step, as a multiple of our time with everything on",
        [Bars(cell.title, cell.bars()) for cell in cells],
    )
    return Table(
        "Training step against an HF model and TRL, and what each idea is worth",
        COLUMNS,
        [line for cell in cells for line in cell.lines()],
        (
            f"{shape}, fp32; output layer {shape.size.head_share:.1%} of the linear FLOPs "
            f"(Llama 2 7B {MODELS['7b'].head_share:.1%}, Llama 3.1 8B {MODELS['8b'].head_share:.1%}).",
            "HF / this: median (range) of ratios round by round, HF with a live reference. formula: the same "
            "ratio in FLOPs, for this model and for the two large ones.",
            f"time / formula: target at most {TARGET}, from our plain step's time.",
        ),
        tuple(cell.record() for cell in cells),
    )


def variants_of(ours: OurSteps) -> dict[str, Variant]:
    """Return our steps with some ideas switched off, by the names of the waterfall."""
    return {name: Variant(ours, **switches) for name, switches in SWITCHES.items()}


def our_steps(ours: OurSteps, groups: Sequence[Group], stored: Sequence[Group]) -> dict[str, Callable[[], object]]:
    """Return our steps on these groups, by the names of the waterfall.

    stored: the same groups with reference log-probs.
    """
    return {
        **{name: partial(variant.step, groups) for name, variant in variants_of(ours).items()},
        RESPONSE_ONLY: partial(ours.step, groups),
        STORED: partial(ours.step, stored),
    }


def count_work(ours: OurSteps, steps: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, int]]:
    """Run each step once and count what passes through policy and reference."""
    models = (ours.trainee.policy.model, ours.reference.model)
    return {name: counted(step, *models) for name, step in steps.items()}


@dataclass(frozen=True)
class Cell:
    """The measurement of one kind of lengths and one K.

    Attributes:
        lengths: name of their kind.
        peers: at their best settings; HF first.
        rungs: our steps and the formula's view of them, the plain one first.
        timings: of all sides.
        counts: what passed through the models in each of our steps.
    """

    lengths: str
    size: ModelSize
    groups: Sequence[Group]
    peers: Sequence[PeerSteps]
    rungs: Sequence[Rung]
    timings: Timings
    counts: dict[str, dict[str, int]]
    difference: float

    @classmethod
    def measure(
        cls, lengths: str, groups: Sequence[Group], shape: Shape, runtime: Runtime, *, rounds: int, clock: Clock
    ) -> Cell:
        """Compare all sides' gradients, count our work and time all sides.

        Raises Different if gradients differ.
        """
        pairs = len(groups[0].candidates) == 2
        loss = PAIR if pairs else REWARDS
        with matched_models(shape, runtime, COMPUTE) as matched:
            ours = OurSteps.of(matched, loss)
            stored = ours.stored(groups)
            kinds: list[Peer] = [StraightforwardLoss(matched, loss)]
            kinds += [TrlTrainer(matched, loss)] if pairs else []
            peers = [PeerSteps.at_best(kind, groups, clock) for kind in kinds]
            wanted = peers[0].gradients(groups)
            found = [variant.gradients(groups) for variant in variants_of(ours).values()]
            found += [ours.gradients(groups), *(peer.gradients(groups) for peer in peers[1:])]
            difference = max(agree(each, wanted, tolerance=TOLERANCE) for each in found)
            steps = our_steps(ours, groups, stored)
            counts = count_work(ours, steps)
            for peer in peers:
                steps[peer.peer.name] = partial(peer.step, groups)
                steps[_stored(peer)] = partial(peer.step, stored)
            timings = alternate(steps, rounds=rounds, warmup=0, clock=clock)  # all but the peers' Adam has run
        rungs = waterfall([Lengths.of(group) for group in groups])
        return cls(lengths, shape.size, groups, peers, rungs, timings, counts, difference)

    @property
    def candidates(self) -> int:
        """The number K of candidates of a group."""
        return len(self.groups[0].candidates)

    @property
    def title(self) -> str:
        """Name of the case."""
        return f"{self.lengths}, K={self.candidates}"

    def lines(self) -> list[tuple[str, ...]]:
        """Make the table's lines: peers, then ours from the plain step on."""
        lines = []
        for peer in self.peers:
            work = padded_work(peer.peer.batches(self.groups, peer.batching))
            for side, live in ((peer.peer.name, True), (_stored(peer), False)):
                shown = peer.shown if live else f"{peer.peer.name}, stored log-probs"
                lines.append(self._line(shown, side, Rung(side, work, live)))
        return lines + [self._line(f"ours: {rung.name}", rung.name, rung) for rung in self.rungs]

    def _line(self, shown: str, side: str, rung: Rung) -> tuple[str, ...]:
        hf, counts = self.peers[0], self.counts.get(side, {})
        base = Rung("HF", padded_work(hf.peer.batches(self.groups, hf.batching)), live=True)
        formula = [f"{base.flops(size) / rung.flops(size):.2f}" for size in (self.size, MODELS["7b"], MODELS["8b"])]
        passes = 2 if rung.live else 1
        return (
            self.lengths,
            str(self.candidates),
            shown,
            str(counts.get("tokens", passes * rung.work.tokens)),
            str(counts.get("projected", passes * rung.work.projected)),
            f"{self.timings.median(side):.2f}",
            self.timings.shown("HF", side),
            *formula,
            f"{self.over_formula(rung):.2f}" if side in self.counts else "",
        )

    def over_formula(self, rung: Rung) -> float:
        """Compute our time over what the formula makes of our plain step's."""
        expected = rung.flops(self.size) / self.rungs[0].flops(self.size)
        return self.timings.ratio(rung.name, PLAIN) / expected

    def summary(self) -> str:
        """Say in a line what came out, while the benchmark goes on."""
        ratios = ", ".join(f"{key} {value:.2f}" for key, value in self.ratios().items())
        worst = max(self.over_formula(rung) for rung in self.rungs)
        settings = "; ".join(peer.shown for peer in self.peers)
        return f"{ratios}; time / formula at most {worst:.2f}; gradients differ by {self.difference:.1e}; {settings}"

    def bars(self) -> list[tuple[str, float]]:
        """List sides and their times over that of our step with everything on."""
        sides = [(peer.shown, peer.peer.name) for peer in self.peers]
        sides += [(f"ours: {rung.name}", rung.name) for rung in self.rungs]
        return [(shown, self.timings.ratio(side, STORED)) for shown, side in sides]

    def ratios(self) -> dict[str, float]:
        """Compute the ratios that are kept: each peer over ours, and plain over each idea."""
        found = {}
        for peer in self.peers:
            name = peer.peer.name
            found[f"{name} / plain"] = self.timings.ratio(name, PLAIN)
            found[f"{name} / ours, live"] = self.timings.ratio(name, RESPONSE_ONLY)
            found[f"{name} / ours, stored"] = self.timings.ratio(_stored(peer), STORED)
        return found | {f"plain / {rung.name}": self.timings.ratio(PLAIN, rung.name) for rung in self.rungs[1:]}

    def record(self) -> Record:
        """Return counts and ratios, to be kept and compared."""
        counts = {f"{name}: {what}": n for name, each in self.counts.items() for what, n in each.items()}
        return Record(self.title, counts, self.ratios())


def _stored(peer: PeerSteps) -> str:
    return f"{peer.peer.name} stored"
