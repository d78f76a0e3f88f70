"""A request to stop is noted, and the former handlers come back."""

from __future__ import annotations

import os
import signal

import pytest

from exo_megatron.training.signals import stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
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


def test_restored_after_an_exception() -> None:
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), stop_on_signal():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == former
