"""A training step of ours against another library's: gradients first, then times with live and
stored references.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from exo_megatron.data.groups import Group
from tools.bench.peer import Peer, PeerSteps
from tools.bench.sides import agree
from tools.bench.timing import Timings, alternate
from tools.bench.training import OurSteps

TOLERANCE = 1e-4
COMPARED = 16
"""Number of groups whose gradients are compared: two micro-batches of the other side."""
NOTE = "stored: ours reads reference log-probs, theirs computes them; both stored: neither computes them."


@dataclass(frozen=True)
class Versus:
    """Times of both sides, and the difference of their gradients."""

    timings: Timings
    difference: float

    @classmethod
    def measure(cls, ours: OurSteps, peer: Peer, groups: Sequence[Group], rounds: int) -> Versus:
        """Compare gradients and time both sides.

        Raises Different if the gradients of the first groups differ.
        """
        theirs = PeerSteps(peer)
        compared = groups[:COMPARED]
        difference = agree(ours.gradients(compared), theirs.gradients(compared), tolerance=TOLERANCE)
        stored = ours.stored(groups)
        sides = {
            "ours live": lambda: ours.step(groups),
            "theirs live": lambda: theirs.step(groups),
            "ours stored": lambda: ours.step(stored),
            "theirs stored": lambda: theirs.step(stored),
        }
        return cls(alternate(sides, rounds=rounds, warmup=0), difference)  # the gradients were the warm-up

    def rows(self, what: str, targets: Mapping[str, float]) -> list[tuple[str, ...]]:
        """Make table rows: what, reference, our seconds, ratio, target (by reference), gradient
        difference.
        """
        rows: list[tuple[str, ...]] = []
        for reference, ours, theirs in (
            ("live", "ours live", "theirs live"),
            ("stored", "ours stored", "theirs live"),
            ("both stored", "ours stored", "theirs stored"),
        ):
            target = f"{targets[reference]}" if reference in targets else ""
            shown = (f"{self.timings.median(ours):.2f}", self.timings.shown(theirs, ours), target)
            rows.append((what, reference, *shown, f"{self.difference:.1e}"))
        return rows
