"""The watch of a rank other than 0: its beats to the hub, and what it does when rank 0 is lost."""

from __future__ import annotations

import os
import select
import socket
import time
from contextlib import suppress
from dataclasses import astuple
from typing import Any

from exo_megatron.config.sections import RuntimeConfig
from exo_megatron.parallel.launch import Launch
from exo_megatron.parallel.watch.bulletin import Bulletin, Ruling
from exo_megatron.parallel.watch.peers import Peer, beat_seconds, gone, silent
from exo_megatron.parallel.watch.vitals import Sign
from exo_megatron.parallel.watch.wire import Lines, line_of

POLL_SECONDS = 0.25
LONGEST_TEXT = 8192
LAST_WORD_SECONDS = 5.0
"""Seconds that a rank waits for the hub at the end of the world."""


def join_hub(launch: Launch, port: int, token: str, limits: RuntimeConfig) -> socket.socket:
    """Open the connection to the hub of rank 0. Raises OSError."""
    link = socket.create_connection((launch.master_addr, port), timeout=min(limits.start_seconds, 30.0))
    hello = {"token": token, "rank": launch.rank, "host": socket.gethostname(), "pid": os.getpid()}
    link.sendall(line_of(hello))
    link.settimeout(limits.timeout_seconds)
    return link


class Member:
    """The watch of a rank other than 0."""

    def __init__(self, bulletin: Bulletin, link: socket.socket, world_size: int, limits: RuntimeConfig) -> None:
        self._bulletin = bulletin
        self._link = link
        self._limits = limits
        self._lines = Lines()
        self._hub = Peer(0, "its node", 0)
        self._departed = False
        self._beat_seconds = beat_seconds(limits, world_size)

    def run(self) -> None:
        """Send beats and hear the hub until the main thread closes the watch, or rank 0 is lost."""
        beat_at = looked = time.monotonic()
        try:
            while not self._bulletin.closing.is_set():
                if time.monotonic() >= beat_at:
                    self._send({"beat": self._bulletin.vitals.sample().as_json()})
                    beat_at = time.monotonic() + self._beat_seconds
                self._tell_departure()
                self._listen(POLL_SECONDS)
                now = time.monotonic()
                self._hub.forgive(now - looked - POLL_SECONDS)  # of a process that was stopped itself, before it judges
                looked = now
                if self._hub.silence() > self._limits.timeout_seconds:
                    self._bulletin.rule(silent(self._hub, self._limits))
                    return
            self._say_goodbye()
        except (OSError, ValueError):
            if not (self._hub.ended or self._bulletin.closing.is_set()):
                self._bulletin.rule(gone(self._hub))
        finally:
            self._link.close()

    def forget(self) -> None:
        """Close the connection in a process that was forked from this one, which it would outlive there."""
        with suppress(OSError):
            os.close(self._link.detach())

    def _tell_departure(self) -> None:
        if self._bulletin.departure is not None and not self._departed:
            self._departed = True
            code, text, crashed = astuple(self._bulletin.departure)
            self._send({"depart": [code, text[-LONGEST_TEXT:], crashed]})

    def _listen(self, seconds: float) -> None:
        """Take what the hub says within some seconds. Raises OSError if it has ended."""
        if select.select([self._link], [], [], seconds)[0]:
            data = self._link.recv(65536)
            if not data:
                raise ConnectionResetError
            for message in self._lines.take(data):
                self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        if "beat" in message:
            self._hub.hear(Sign(**message["beat"]))
        elif "hub" in message:
            self._hub.host, self._hub.pid = message["hub"]
        elif "ruling" in message:
            self._bulletin.rule(Ruling(*message["ruling"]))
        elif "answer" in message:
            self._bulletin.answer(is_new=bool(message["answer"]))
        elif "end" in message:
            self._hub.ended = True

    def _send(self, message: dict[str, Any]) -> None:
        self._link.sendall(line_of(message))

    def _say_goodbye(self) -> None:
        """Tell the hub that this rank has come to its end, and hear it say so."""
        self._send({"end": True})
        end = time.monotonic() + LAST_WORD_SECONDS
        while not self._hub.ended and time.monotonic() < end:
            self._listen(POLL_SECONDS)
