from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest

from exo_megatron.utils.progress import Progress, show_duration


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    writes = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.writes += 1
        return super().write(text)


@pytest.fixture(autouse=True)
def screen(monkeypatch):
    """What rich reads of the terminal that the tests are started in."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


def seen(line: str) -> str:
    """A line without its colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", line)


def test_log_gets_a_line_every_ten_seconds_and_a_last_one():
    clock, stream = Clock(), io.StringIO()
    progress = Progress("align", 50, "steps", enabled=True, stream=stream, clock=clock)
    for step in range(25):
        clock.now += 1
        progress.advance(1, loss=1 / (step + 3))
    progress.close()
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0] == "align: 10/50 steps  20%  1.0 steps/s  ETA 0:40  loss 0.08333"
    assert lines[2] == "align: 25/50 steps  50%  1.0 steps/s  ETA 0:25  loss 0.03704"


def test_terminal_rewrites_one_line():
    clock, stream = Clock(), Terminal()
    with Progress("rollout", 4, "prompts", enabled=True, stream=stream, clock=clock) as progress:
        clock.now += 0.05
        progress.advance(1, tokens_per_second=12345.6)
        assert stream.getvalue() == ""  # not more often than ten times a second
        for _ in range(3):
            clock.now += 1.0
            progress.advance(1)
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    shown = text.rstrip("\n").split("\r")
    assert shown[0] == ""
    assert len(shown) == 4
    assert seen(shown[-1]).startswith("rollout: ━━━━━━━━━━ 4/4 prompts  100%  1.3 prompts/s  tokens_per_second 12,346")
    assert "ETA" not in shown[-1]


def test_a_shorter_line_covers_the_longer_one():
    clock, stream = Clock(), Terminal()
    progress = Progress("x", 2, "steps", enabled=True, stream=stream, clock=clock)
    clock.now += 1
    progress.advance(1, note="a long remark")
    clock.now += 1
    progress.advance(1, note="b")
    first, second = stream.getvalue().split("\r")[1:]
    assert len(seen(second)) >= len(seen(first).rstrip())


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (
            110,
            "align: ━━━           1200/5000 steps  24%  2.0 s/step  ETA 2:06:40  loss 0.6931  tokens_per_second 12345",
        ),
        (80, "align: ━━         1200/5000 steps  24%  2.0 s/step  ETA 2:06:40  loss 0.6931"),
        (59, "align: 1200/5000 steps  24%  2.0 s/step  ETA 2:06:40"),
        (40, "align: 1200/5000 steps  24%  ETA 2:06:40"),
        (39, "align: 1200/5000 steps  24%"),
        (26, "align: 1200/5000 steps"),
        (12, "align: 1200/"),
    ],
)
def test_a_terminal_gets_what_fits_and_every_line_fills_the_width(monkeypatch, columns, line):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")  # the missing part of the bar is blank then
    clock, stream = Clock(), Terminal()
    progress = Progress("align", 5000, "steps", enabled=True, initial=1190, stream=stream, clock=clock)
    clock.now += 20
    progress.advance(10, loss="0.6931", tokens_per_second="12345")
    _, drawn = stream.getvalue().split("\r")
    assert seen(drawn) == line.ljust(columns)  # what others print begins on the next row
    assert stream.writes == 1  # nothing to see between two states


def test_done_and_missing_differ_where_there_are_sixteen_colours(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    clock, stream = Clock(), Terminal()
    progress = Progress("x", 2, "steps", enabled=True, stream=stream, clock=clock)
    clock.now += 1
    progress.advance(1)
    clock.now += 1
    progress.advance(1)
    half, whole = (re.findall(r"\x1b\[(\d+)m[━╸╺]", line) for line in stream.getvalue().split("\r")[1:])
    assert half[0] not in half[1:]
    assert whole == half[:1]


def test_a_log_needs_no_rich():
    program = """
import io, sys
from exo_megatron.utils.progress import Progress
Progress("x", 2, "steps", enabled=True, stream=io.StringIO()).close()
print(sorted({"rich", "torch"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_rate_follows_the_last_half_minute():
    clock, stream = Clock(), io.StringIO()
    progress = Progress("x", 1000, "steps", enabled=True, stream=stream, clock=clock)
    clock.now += 300  # a slow first step
    progress.advance(1)
    for _ in range(60):
        clock.now += 1
        progress.advance(1)
    assert "1.0 steps/s" in progress.line(clock.now)


def test_slow_units_are_shown_as_seconds_each():
    clock = Clock()
    progress = Progress("x", 10, "steps", enabled=True, stream=io.StringIO(), clock=clock)
    clock.now += 20
    progress.advance(4)
    assert progress.line(clock.now) == "x: 4/10 steps  40%  5.0 s/step  ETA 0:30"


def test_resumed_work_does_not_count_for_the_rate():
    clock = Clock()
    progress = Progress("x", 100, "steps", enabled=True, initial=90, stream=io.StringIO(), clock=clock)
    clock.now += 10
    progress.advance(5)
    assert progress.line(clock.now) == "x: 95/100 steps  95%  2.0 s/step  ETA 0:10"


def test_disabled_prints_nothing():
    clock, stream = Clock(), io.StringIO()
    progress = Progress("x", 2, "steps", enabled=False, stream=stream, clock=clock)
    clock.now += 100
    progress.advance(2)
    progress.close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("total", "line"), [(0, "x: 0/0 steps  -"), (5, "x: 0/5 steps  0%")])
def test_nothing_done_yet(total, line):
    assert Progress("x", total, "steps", enabled=True, stream=io.StringIO()).line(1e12) == line


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (3599.7, "1:00:00"), (10805, "3:00:05")]
)
def test_durations(seconds, text):
    assert show_duration(seconds) == text
