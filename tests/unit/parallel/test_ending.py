"""What rank 0 does for all; a request to stop is noted, and the former handlers come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from exo_megatron.errors import DataError
from exo_megatron.parallel import ending
from exo_megatron.parallel.ending import SAME_KEY_PRESS, StopRequest, on_main, stop_on_signal
from tests.unit.conftest import Rank


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_noted_and_restored(number: int) -> None:
    seen: list[int] = []
    former = signal.signal(number, lambda received, frame: seen.append(received))
    try:
        with stop_on_signal() as stop:
            assert not stop
            os.kill(os.getpid(), number)
            assert stop and stop.received == number
            assert seen == []
        os.kill(os.getpid(), number)
        assert seen == [number]
    finally:
        signal.signal(number, former)


PATIENT = """
import sys, time
from exo_megatron.parallel.ending import stop_on_signal
with stop_on_signal() as stop:
    while True:
        time.sleep(0.05)
        print("stop" if stop else "go", flush=True)
"""


def test_a_second_ctrl_c_leaves_at_once_without_a_traceback() -> None:
    """torchrun passes the terminal's Ctrl-C on to processes that have it already: at once, it is the same one."""
    process = subprocess.Popen(
        [sys.executable, "-c", PATIENT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        assert process.stdout.readline() == "go\n"
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            while process.stdout.readline() != "stop\n":
                assert process.poll() is None
        time.sleep(SAME_KEY_PRESS + 0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == -signal.SIGINT
        assert process.stderr.read() == ""
    finally:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_the_first_ctrl_c_after_another_signal_still_saves(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(ending.time, "monotonic", lambda: clock[0])
    killed: list[int] = []
    monkeypatch.setattr(ending, "_leave_by", killed.append)
    stop = StopRequest()
    for at, received, left in (
        (0.0, number, []),
        (100.0, number, []),
        (200.0, signal.SIGINT, []),
        (200.0 + SAME_KEY_PRESS / 2, signal.SIGINT, []),
        (201.0 + SAME_KEY_PRESS, number, []),
        (202.0 + SAME_KEY_PRESS, signal.SIGINT, [signal.SIGINT]),
    ):
        clock[0] = at
        stop.handle(received, None)
        assert stop.received == number
        assert killed == left, at


def test_restored_after_an_exception() -> None:
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), stop_on_signal():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == former


def test_work_is_done_once_and_its_result_is_everywhere():
    main = Rank(0)
    assert on_main(main, lambda: 42) == 42
    peer = Rank(1, sent=main.sent)

    def never():
        raise AssertionError

    assert on_main(peer, never) == 42


def test_an_error_of_rank_0_is_raised_everywhere():
    def fail():
        raise DataError("d:1", "bad", expected="good", fix="mend")

    main = Rank(0)
    with pytest.raises(DataError, match="d:1: bad; expected good; fix: mend"):
        on_main(main, fail)
    with pytest.raises(DataError, match="d:1: bad; expected good; fix: mend"):
        on_main(Rank(1, sent=main.sent), fail)
