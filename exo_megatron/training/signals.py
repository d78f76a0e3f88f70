"""Asks a run to stop after its current step: Slurm's warning before the limit, or a termination request."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)


class StopRequest:
    """Whether a stop signal has arrived in this process."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __bool__(self) -> bool:
        return self.received is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        self.received = number


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Note SIGUSR2 and SIGTERM instead of dying from them; the former handlers come back at the end."""
    request = StopRequest()
    former = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
