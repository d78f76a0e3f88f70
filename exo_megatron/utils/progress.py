"""A progress line of a long loop: count, rate and time left."""

from __future__ import annotations

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
"""The rate is measured over about 30 s, so that a slow first step does not spoil the estimate."""

BAR_SHARE = 8
"""The bar takes one of this many columns of a terminal."""

DONE, MISSING = "green", "bright_black"
"""Colours of the bar that every terminal has. With 16 colours, those of rich look alike."""


class Progress:
    """A progress line on standard error.

    On a terminal it has a bar and is redrawn in place; in a log file it is plain text every 10 s.

    Args:
        label: name of the activity (``align``).
        total: units in all.
        unit: name of one unit in the plural (``steps``).
        enabled: False on all ranks but one, where nothing is printed.
        initial: units that were done before this process began (a resumed run).
        stream: standard error by default.
        clock: time in seconds.
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def advance(self, count: int = 1, **fields: object) -> None:
        """Count finished units.

        `fields` are shown after the estimate until others of the same name replace them.
        """
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
        """Print the last state unless it has been printed, and end the line."""
        if not self._enabled:
            return
        self._enabled = False
        if self._printed_done != self._done:
            self._print(self._clock())
        if self._terminal:
            self._stream.write("\n")
            self._stream.flush()

    def line(self, now: float) -> str:
        """Describe the progress at the time `now` (of `clock`) in words."""
        facts, fields = self._parts(now)
        return f"{self._label}: {_join(facts + fields)}"

    def _parts(self, now: float) -> tuple[list[str], list[str]]:
        """Return the facts (count, share, and rate and ETA where they are known) and the fields."""
        facts = [
            f"{self._done}/{self._total} {self._unit}",
            f"{100 * self._done // self._total}%" if self._total else "-",
        ]
        rate = self._rate(now)
        if rate is not None:
            facts.append(_show_rate(rate, self._unit))
            if self._done < self._total:
                facts.append(f"ETA {show_duration((self._total - self._done) / rate)}")
        return facts, [f"{name} {_show_value(value)}" for name, value in self._fields.items()]

    def _rate(self, now: float) -> float | None:
        """Compute units per second over the window; None before the first unit is done."""
        started, done = self._samples[0]
        if now <= started or self._done <= done:
            return None
        return (self._done - done) / (now - started)

    def _print(self, now: float) -> None:
        if self._terminal:
            self._draw(now)
        else:
            self._stream.write(self.line(now) + "\n")
        self._stream.flush()
        self._printed_at = now
        self._printed_done = self._done

    def _draw(self, now: float) -> None:
        """Draw the terminal's line over the former one.

        There is no thread, hidden cursor or replaced `sys.stdout`. The line is filled to the last
        column, so that later output of others begins on a line of its own.
        """
        from rich.console import Console
        from rich.control import Control
        from rich.progress_bar import ProgressBar
        from rich.segment import ControlType, Segments
        from rich.table import Table
        from rich.text import Text

        console = Console(file=self._stream, force_terminal=True)
        label, bar = f"{self._label}:", console.width // BAR_SHARE
        words, beside_bar = _fit(*self._parts(now), width=console.width - len(label) - 1, bar=bar)
        grid = Table.grid(padding=(0, 1, 0, 0), expand=True)
        grid.add_column(no_wrap=True)
        cells: list[Text | ProgressBar] = [Text(label)]
        if beside_bar:
            grid.add_column(width=bar)
            cells.append(ProgressBar(self._total, self._done, style=MISSING, complete_style=DONE, finished_style=DONE))
        grid.add_column(no_wrap=True, overflow="crop", ratio=1)
        grid.add_row(*cells, Text(words))
        drawn = console.render_lines(grid)[0]
        console.print(Control(ControlType.CARRIAGE_RETURN), Segments(drawn), end="", soft_wrap=True)


def _fit(facts: list[str], fields: list[str], *, width: int, bar: int) -> tuple[str, bool]:
    """Choose the text that fits into `width` columns, and tell whether a bar fits beside it.

    If that is little, these are dropped in order: fields from the right, the bar, the rate, the ETA,
    the share.
    """
    whole = [_join(facts + fields[:number]) for number in range(len(fields), -1, -1)]
    for words in whole:
        if len(words) + 1 + bar <= width:
            return words, True
    short = [_join(facts[:2] + facts[3:]), _join(facts[:2])]
    return next((words for words in whole + short if len(words) <= width), facts[0]), False


def _join(parts: list[str]) -> str:
    return "  ".join(parts)


def show_duration(seconds: float) -> str:
    """Write a duration as hours, minutes and seconds: ``0:07``, ``12:30``, ``3:00:05``."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _show_rate(rate: float, unit: str) -> str:
    return f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{unit.removesuffix('s')}"


def _show_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)
