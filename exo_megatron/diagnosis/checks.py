"""A check with its verdict, and the run of a list of checks within a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from exo_megatron.errors import ExoError, reason
from exo_megatron.parallel.runtime import Runtime, share_object

CheckVerdict = Literal["passed", "failed", "slower than expected", "more than expected", "not run (time)", "not run"]
SEVERITY: tuple[CheckVerdict, ...] = (
    "passed",
    "not run",
    "not run (time)",
    "more than expected",
    "slower than expected",
    "failed",
)


@dataclass(frozen=True)
class Outcome:
    """The result of a check, and the verdict on it."""

    verdict: CheckVerdict
    seen: str
    expected: str


@dataclass(frozen=True)
class Figure:
    """A difference and the largest one that passes."""

    name: str
    seen: float
    limit: float


def fast_enough(fast: bool, seen: str, expected: str) -> Outcome:
    """Return the outcome of a check of speed."""
    return Outcome("passed" if fast else "slower than expected", seen, expected)


def judge(figures: Sequence[Figure], note: str = "") -> Outcome:
    """Pass if no figure exceeds its limit; one that is not a number does.

    note: goes before the figures.
    """
    passed = all(figure.seen <= figure.limit for figure in figures)
    seen = ", ".join(f"{figure.name} {figure.seen:.2g}" for figure in figures)
    limits = [f"{figure.limit:.2g}" for figure in figures]
    expected = "at most " + (limits[0] if len(set(limits)) == 1 else ", ".join(limits))
    return Outcome("passed" if passed else "failed", f"{note}; {seen}" if note else seen, expected)


@dataclass(frozen=True)
class DeviceCheck:
    """A check of this device, which all ranks run together.

    Attributes:
        name: for the table.
        seconds: gives the time that it is expected to take, when its turn has come.
        run: does it. Returns None on ranks that only took part.
    """

    name: str
    seconds: Callable[[], float]
    run: Callable[[], Outcome | None]


@dataclass(frozen=True)
class Result:
    """One line of the table. seconds: that it took."""

    check: str
    verdict: CheckVerdict
    seen: str
    expected: str
    seconds: float


def run_check(check: DeviceCheck, runtime: Runtime, deadline: float) -> Result:
    """Run a check unless it would outlast the deadline (of `time.monotonic` on rank 0).

    Collective over the world. Returns the worst outcome of all ranks, on all ranks. In a lone
    process a check that raises has failed, and the next ones still run; with several processes the
    others may be waiting in a collective, so the exception goes on.
    """
    started = time.monotonic()
    needed = check.seconds()
    if not runtime.broadcast_object(started + needed <= deadline):
        return Result(check.name, "not run (time)", "", f"about {needed:.0f} s left, see --minutes", 0.0)
    outcome: Outcome | None
    try:
        outcome = check.run()
    except Exception as error:
        if runtime.world_size > 1:
            raise
        outcome = failure(error)
    outcomes = [each for each in share_object(outcome) if each is not None]
    worst = max(outcomes, key=lambda each: SEVERITY.index(each.verdict))
    return Result(check.name, worst.verdict, worst.seen, worst.expected, time.monotonic() - started)


def failure(error: Exception) -> Outcome:
    """Describe an exception in a check."""
    kind = "" if isinstance(error, ExoError) else f"{type(error).__name__}: "
    return Outcome("failed", f"{kind}{reason(error)}", "no exception")
