"""How far a long loop is: count, rate and time left, on one line."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

TERMINAL_INTERVAL = 0.1
LOG_INTERVAL = 10.0
SAMPLE_INTERVAL = 1.0
SAMPLES = 30
"""The rate is measured over about the last half minute, so that a slow first step does not spoil the estimate."""


class Progress:
    """A progress line on standard error: rewritten in place on a terminal, a new line every 10 s in a log file.

    label: what is going on (``align``).
    total: units in all; initial: units that were done before this process began (a resumed run).
    unit: name of one unit in the plural (``steps``).
    enabled: False on all ranks but one; nothing is printed then.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        *,
        enabled: bool,
        initial: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = label
        self._total = total
        self._unit = unit
        self._enabled = enabled
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._clock = clock
        self._done = initial
        self._fields: dict[str, object] = {}
        self._samples: deque[tuple[float, int]] = deque([(clock(), initial)], maxlen=SAMPLES)
        self._printed_at = clock()
        self._printed_done: int | None = None
        self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def advance(self, count: int = 1, **fields: object) -> None:
        """Count finished units. `fields` are shown after the estimate until others of the same name replace them."""
        if not self._enabled:
            return
        self._done += count
        self._fields.update(fields)
        now = self._clock()
        if now - self._samples[-1][0] >= SAMPLE_INTERVAL:
            self._samples.append((now, self._done))
        if now - self._printed_at >= (TERMINAL_INTERVAL if self._terminal else LOG_INTERVAL):
            self._print(now)

    def close(self) -> None:
        """Print the last state, where it has not been printed, and end the line."""
        if not self._enabled:
            return
        self._enabled = False
        if self._printed_done != self._done:
            self._print(self._clock())
        if self._terminal:
            self._stream.write("\n")
            self._stream.flush()

    def line(self, now: float) -> str:
        """The line as of the time `now` (of `clock`)."""
        share = f"{100 * self._done // self._total}%" if self._total else "-"
        parts = [f"{self._label}: {self._done}/{self._total} {self._unit}", share]
        rate = self._rate(now)
        if rate is not None:
            parts.append(_show_rate(rate, self._unit))
            if self._done < self._total:
                parts.append(f"ETA {show_duration((self._total - self._done) / rate)}")
        parts += [f"{name} {_show_value(value)}" for name, value in self._fields.items()]
        return "  ".join(parts)

    def _rate(self, now: float) -> float | None:
        """Units per second over the window, or None before the first unit is done."""
        started, done = self._samples[0]
        if now <= started or self._done <= done:
            return None
        return (self._done - done) / (now - started)

    def _print(self, now: float) -> None:
        text = self.line(now)
        if self._terminal:
            text = text[: max(shutil.get_terminal_size().columns - 1, 20)]
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()
        self._printed_at = now
        self._printed_done = self._done


def show_duration(seconds: float) -> str:
    """Hours, minutes and seconds: ``0:07``, ``12:30``, ``3:00:05``."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _show_rate(rate: float, unit: str) -> str:
    return f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{unit.removesuffix('s')}"


def _show_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)
