"""The signs by which peers know that the main thread of a rank goes on, taken by another thread."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = Path(__file__).parents[1]
COLLECTIVES = "/torch/distributed/"
LEAST_WORK = 0.01
"""Share of a core that the main thread uses where it computes; waiting for a peer takes far less."""


@dataclass(frozen=True)
class Sign:
    """A look at the main thread of a rank.

    Attributes:
        doing: the work that it has begun, in words.
        since: seconds since it began that.
        place: file and function of this package that it is in.
        still: seconds without a step in Python and without work of its thread.
        waiting: whether it is in torch.distributed, for its peers.
    """

    doing: str
    since: float
    place: str
    still: float
    waiting: bool

    def as_json(self) -> dict[str, Any]:
        """Return the fields for a message."""
        return asdict(self)

    def told(self) -> str:
        """Say in words what the rank was doing."""
        return f"it was in {self.doing}, begun {self.since:.0f} s before, at {self.place}"


UNKNOWN = Sign("its start", 0.0, "an unknown place", 0.0, False)


class Vitals:
    """Samples of the thread that makes this object. `begin` costs it an assignment."""

    def __init__(self, doing: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._thread = threading.get_ident()
        self._cpu_clock = time.pthread_getcpuclockid(self._thread)
        self._begun = (doing, clock())
        self._position: tuple[object, ...] = ()
        self._cpu, self._looked, self._moved = self._cpu_seconds(), clock(), clock()

    def begin(self, what: str) -> None:
        """Note what the main thread does from now on."""
        self._begun = (what, self._clock())

    def sample(self) -> Sign:
        """Look at the main thread. One thread calls it."""
        now, cpu, begun = self._clock(), self._cpu_seconds(), self._begun
        frame = sys._current_frames().get(self._thread)
        position = (begun, None if frame is None else (frame.f_code, frame.f_lasti))
        if position != self._position or cpu - self._cpu > LEAST_WORK * (now - self._looked):
            self._moved = now
        self._position, self._cpu, self._looked = position, cpu, now
        place, waiting = _place(frame)
        return Sign(begun[0], now - begun[1], place, now - self._moved, waiting)

    def _cpu_seconds(self) -> float:
        return time.clock_gettime(self._cpu_clock)


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """Name the innermost function of this package, and tell whether it has called a collective."""
    waiting = False
    while frame is not None:
        file = frame.f_code.co_filename
        if Path(file).is_relative_to(PACKAGE):
            return f"{Path(file).relative_to(PACKAGE)}: {frame.f_code.co_name}", waiting
        waiting = waiting or COLLECTIVES in file
        frame = frame.f_back
    return UNKNOWN.place, waiting
