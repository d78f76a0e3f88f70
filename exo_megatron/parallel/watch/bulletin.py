"""The facts that the main thread of a rank and the thread of its watch share, and the end of their process."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from exo_megatron.parallel.watch.vitals import Vitals

GRACE_SECONDS = 6.0
"""Seconds that a rank has to leave by itself after a peer has failed with an error that the peer tells."""

SPREAD_SECONDS = 1.0
"""Seconds from a ruling to the end of a rank: rank 0 must reach all others, and a launcher may end them all."""

ANSWER_SECONDS = 5.0
"""Seconds that a rank that fails waits for what the hub says of it."""


@dataclass(frozen=True)
class Ruling:
    """The first end of a rank, or of all progress, from which the end of the world follows.

    Attributes:
        rank: the rank that it happened to; None where all ranks are stuck.
        code: exit code of the others.
        text: the line that the others write.
        at_once: whether they leave without the chance to fail by themselves.
    """

    rank: int | None
    code: int
    text: str
    at_once: bool


@dataclass(frozen=True)
class Departure:
    """A rank that leaves with an error.

    Attributes:
        code: its exit code.
        text: what it has to write.
        crashed: whether the cause is unknown, and may be the loss of a peer.
    """

    code: int
    text: str
    crashed: bool


class Bulletin:
    """The facts that both threads of one rank know. Each is set once.

    Attributes:
        rank: of this process.
        vitals: of its main thread.
        closing: set by the main thread, after the last collective of the world.
        departure: set by the main thread when it fails.
        alone: set by the hub once no other rank is left.
    """

    def __init__(self, rank: int, vitals: Vitals) -> None:
        self.rank = rank
        self.vitals = vitals
        self.closing = threading.Event()
        self.departure: Departure | None = None
        self.alone = threading.Event()
        self.ruling: Ruling | None = None
        self._news = threading.Condition()
        self._is_new: bool | None = None
        self._telling = threading.Lock()

    def answer(self, *, is_new: bool) -> None:
        """Note whether no other rank has written the text of the departure."""
        with self._news:
            self._is_new = is_new
            self._news.notify_all()

    def rule(self, ruling: Ruling) -> None:
        """Note what ended the world, the first time. Unless it was this rank, or it leaves by itself, this process
        ends soon.
        """
        with self._news:
            if self.ruling is not None or self.closing.is_set():
                return
            self.ruling = ruling
            self._news.notify_all()
        if ruling.rank != self.rank:
            threading.Thread(target=self._end, args=(ruling,), name="end", daemon=True).start()

    def depart(self, departure: Departure) -> tuple[int, str]:
        """Leave with an error. Returns exit code and text of this rank: its own, or those of the cause.

        The text is empty if another rank has written it.
        """
        with self._news:
            self.departure = departure
            if departure.crashed:
                self._news.wait_for(lambda: self.ruling is not None, ANSWER_SECONDS)
            else:
                self._news.wait_for(lambda: self._is_new is not None or self.ruling is not None, ANSWER_SECONDS)
        ruling = self.ruling
        if departure.crashed and ruling is not None and ruling.rank != self.rank:
            return ruling.code, ruling.text
        return departure.code, "" if self._is_new is False else departure.text

    def may_tell(self) -> bool:
        """Tell whether the caller is the first thread of this process to ask, which says why it ends."""
        return self._telling.acquire(blocking=False)

    def _end(self, ruling: Ruling) -> None:
        time.sleep(SPREAD_SECONDS if ruling.at_once else GRACE_SECONDS)
        if self.may_tell():
            leave_with(ruling.text, ruling.code)


def leave_with(text: str, code: int) -> None:
    """Write a line and end this process, whatever its other threads hold or wait for."""
    with suppress(OSError):
        os.write(2, (text + "\n").encode("utf-8", "replace"))
    os._exit(code)
