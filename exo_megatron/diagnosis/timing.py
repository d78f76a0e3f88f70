"""Timing of sides in turn, so that other load of the machine slows all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timings:
    """Seconds of each side, a value per round."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, side: str) -> float:
        """Return the median of a side, in seconds."""
        return statistics.median(self.seconds[side])

    def ratios(self, slow: str, fast: str) -> list[float]:
        """Compute how many times as long `slow` takes as `fast`, round by round."""
        return [a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True)]

    def ratio(self, slow: str, fast: str) -> float:
        """Return the median of `ratios`."""
        return statistics.median(self.ratios(slow, fast))

    def shown(self, slow: str, fast: str) -> str:
        """Format median and range of `ratios` for tables."""
        ratios = self.ratios(slow, fast)
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


Clock = Callable[[], float]
"""Function that gives seconds: of the wall, or of this process's use of the processor."""


def choose_clock(*, quick: bool) -> Clock:
    """Choose the wall clock, but for quick versions on the CPU the processor time of this process.

    Their ratios are compared with kept ones while other programs run.
    """
    return time.process_time if quick and not torch.cuda.is_available() else time.perf_counter


def alternate(
    sides: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1, clock: Clock = time.perf_counter
) -> Timings:
    """Run the sides in turn, `warmup` times untimed and then `rounds` times, each timed by itself.

    Garbage is collected before each run and not during it. On CUDA a run ends when the device has
    finished.
    """
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(warmup + rounds):
        for side, work in sides.items():
            elapsed = timed(work, clock)
            if number >= warmup:
                seconds[side].append(elapsed)
    return Timings({side: tuple(values) for side, values in seconds.items()})


def timed(work: Callable[[], object], clock: Clock = time.perf_counter, *, wait: bool = True) -> float:
    """Measure the seconds of one run; until the device has finished if `wait`, else until the host has."""
    gc.collect()
    gc.disable()
    try:
        finish()
        start = clock()
        work()
        if wait:
            finish()
        return clock() - start
    finally:
        gc.enable()


def finish() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
