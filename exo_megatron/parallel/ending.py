"""The end of work that ranks do together: a failure of one is raised on all; a request to stop is noted."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from exo_megatron.errors import DataError, ExoError, WorldError, reason

if TYPE_CHECKING:
    from exo_megatron.parallel.runtime import Runtime

T = TypeVar("T")


@contextmanager
def failing_together() -> Iterator[None]:
    """Run the block on this rank and wait for the others at its end. Collective over the world.

    If any rank's block raised, every rank raises: an ExoError itself, the same on all, which is then printed
    once. Where it is another exception, the others raise a WorldError, and that rank keeps its traceback.
    """
    import torch.distributed as dist

    from exo_megatron.parallel.runtime import share_object

    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failures = share_object(None if failure is None else _told(failure, dist.get_rank()))
    first = next((each for each in failures if each is not None), None)
    if first is None:
        return
    if failure is not None and not isinstance(failure, ExoError):
        raise failure
    raise first


def on_main(runtime: Runtime, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result, pickled, on every rank.

    Collective over the world. If it raised, every rank raises: an ExoError itself; for other
    failures rank 0 raises its own, the others a WorldError.
    """
    result: T | None = None
    failure: ExoError | None = None
    original: Exception | None = None
    if runtime.is_main:
        try:
            result = work()
        except ExoError as error:
            failure = error
        except Exception as error:
            original = error
            failure = _told(error, 0)
    result, failure = runtime.broadcast_object((result, failure))
    if original is not None:
        raise original
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def check_same(runtime: Runtime, seen: Mapping[str, str]) -> None:
    """Raise DataError on all ranks if one has read something else than rank 0. Collective over the world.

    seen: what was read, in words, with its digest.
    """
    gathered = runtime.gather_objects((socket.gethostname(), dict(seen)))
    on_main(runtime, lambda: _compare(gathered or []))


def _compare(gathered: Sequence[tuple[str, Mapping[str, str]]]) -> None:
    for rank, (host, seen) in enumerate(gathered):
        for what, digest in gathered[0][1].items():
            if seen.get(what) != digest:
                raise DataError(
                    f"rank {rank}, {host}",
                    f"reads something else than rank 0 ({gathered[0][0]}) as {what}",
                    expected="the same on all ranks",
                    fix="put it where every rank reads the same, such as a shared file system",
                )


def _told(error: Exception, rank: int) -> ExoError:
    """Return the error that tells other ranks of one."""
    if isinstance(error, ExoError):
        return error
    return WorldError(
        f"rank {rank}",
        f"failed ({type(error).__name__}: {reason(error)})",
        expected="all ranks to do their part",
        fix="see what that rank has written",
    )


STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
SAME_KEY_PRESS = 2.0
"""Seconds within which a second SIGINT counts as the same Ctrl-C.

torchrun passes on the Ctrl-C that its processes have already received from the terminal.
"""


class StopRequest:
    """A flag that is true once a stop signal has arrived in this process.

    `received`: number of the signal.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._interrupted: float | None = None

    def __bool__(self) -> bool:
        return self.received is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Record the signal. A second Ctrl-C ends the process at once, as without a handler.

        The first one only asks to stop, also after another signal has asked for it.
        """
        if self.received is None:
            self.received = number
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
        elif now - self._interrupted > SAME_KEY_PRESS:
            _leave_by(signal.SIGINT)


def _leave_by(number: int) -> None:
    """End this process by a signal, as without a handler."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Record SIGUSR2, SIGTERM and SIGINT in a block instead of ending the process."""
    request = StopRequest()
    former = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
