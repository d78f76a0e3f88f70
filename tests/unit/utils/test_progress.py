from __future__ import annotations

import io

import pytest

from exo_megatron.utils.progress import Progress, show_duration


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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
    assert shown[-1].startswith("rollout: 4/4 prompts  100%  1.3 prompts/s  tokens_per_second 12,346")
    assert "ETA" not in shown[-1]


def test_a_shorter_line_covers_the_longer_one():
    clock, stream = Clock(), Terminal()
    progress = Progress("x", 2, "steps", enabled=True, stream=stream, clock=clock)
    clock.now += 1
    progress.advance(1, note="a long remark")
    clock.now += 1
    progress.advance(1, note="b")
    first, second = stream.getvalue().split("\r")[1:]
    assert len(second) >= len(first.rstrip())


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
