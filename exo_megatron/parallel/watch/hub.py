"""The hub of the watch, in rank 0: it hears all ranks, and rules what happened first when one is lost or fails."""

from __future__ import annotations

import hashlib
import os
import selectors
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from hmac import compare_digest
from typing import Any

from exo_megatron.config.sections import RuntimeConfig
from exo_megatron.parallel.watch.bulletin import Bulletin, Departure, Ruling
from exo_megatron.parallel.watch.peers import Peer, beat_seconds, failed, gone, silent, stuck
from exo_megatron.parallel.watch.vitals import Sign
from exo_megatron.parallel.watch.wire import Lines, line_of

WAKE_SECONDS = 0.25
SETTLE_SECONDS = 1.0
"""Seconds from the first event to the ruling: a rank often fails because of a peer whose end is heard later."""

GOODBYE_SECONDS = 5.0


@dataclass
class _Link:
    """A connection; `peer` is None until it has said who it is."""

    connection: socket.socket
    lines: Lines = field(default_factory=Lines)
    peer: Peer | None = None


@dataclass(frozen=True)
class _Event:
    """An end of a rank, at a time of the monotonic clock. `crashed`: its cause may be another one."""

    at: float
    crashed: bool
    ruling: Ruling


class Hub:
    """The watch of rank 0."""

    def __init__(
        self, bulletin: Bulletin, door: socket.socket, token: str, world_size: int, limits: RuntimeConfig
    ) -> None:
        self._bulletin = bulletin
        self._door = door
        self._token = token
        self._limits = limits
        self._selector = selectors.DefaultSelector()
        self._own = Peer(0, socket.gethostname(), os.getpid())
        self._peers = {rank: Peer(rank, "its node unknown", 0) for rank in range(1, world_size)}
        self._links: dict[socket.socket, _Link] = {}
        self._events: list[_Event] = []
        self._told: set[bytes] = set()

    def run(self) -> None:
        """Serve all ranks until the main thread closes the watch."""
        self._door.setblocking(False)
        self._selector.register(self._door, selectors.EVENT_READ)
        beat_at = looked = time.monotonic()
        while not self._bulletin.closing.is_set():
            if time.monotonic() >= beat_at:
                self._own.hear(self._bulletin.vitals.sample())
                self._broadcast({"beat": self._own.sign.as_json()})
                beat_at = time.monotonic() + beat_seconds(self._limits, len(self._peers) + 1)
            self._listen()
            now = time.monotonic()
            for peer in self._peers.values():
                peer.forgive(now - looked - WAKE_SECONDS)  # of a process that was stopped itself, before it judges
            looked = now
            self._judge()
        self._say_goodbye()

    def forget(self) -> None:
        """Close all connections in a process that was forked from this one, which they would outlive there."""
        for connection in (self._door, *self._links):
            with suppress(OSError):
                os.close(connection.detach())

    def _listen(self) -> None:
        for key, _ in self._selector.select(WAKE_SECONDS):
            if key.fileobj is self._door:
                self._accept()
            else:
                self._receive(self._links[key.fileobj])  # type: ignore[index]

    def _accept(self) -> None:
        with suppress(OSError):
            connection = self._door.accept()[0]
            connection.setblocking(False)
            self._links[connection] = _Link(connection)
            self._selector.register(connection, selectors.EVENT_READ)

    def _receive(self, link: _Link) -> None:
        try:
            data = link.connection.recv(65536)
            if not data:
                raise ConnectionResetError
            for message in link.lines.take(data):
                self._hear(link, message)
        except BlockingIOError:
            return
        except (OSError, ValueError, TypeError, KeyError):  # closed, or a stranger
            self._drop(link)

    def _hear(self, link: _Link, message: dict[str, Any]) -> None:
        if link.peer is None:
            if not compare_digest(str(message["token"]), self._token):
                raise ValueError("a stranger")
            link.peer = self._peers[message["rank"]]
            link.peer.host, link.peer.pid = str(message["host"]), int(message["pid"])
            self._send(link, {"hub": [self._own.host, self._own.pid]})
            if self._bulletin.ruling is not None:
                self._send(link, _said(self._bulletin.ruling))
        elif "beat" in message:
            link.peer.hear(Sign(**message["beat"]))
        elif "depart" in message:
            is_new = self._note_departure(link.peer, Departure(*message["depart"]))
            self._send(link, {"answer": is_new})
        elif "end" in message:
            link.peer.ended = True

    def _drop(self, link: _Link) -> None:
        """Take a connection out that has ended."""
        self._selector.unregister(link.connection)
        del self._links[link.connection]
        link.connection.close()
        if link.peer is not None and not link.peer.ended:
            self._note(link.peer, gone(link.peer), crashed=False)

    def _note(self, peer: Peer, ruling: Ruling, *, crashed: bool) -> None:
        """Note the end of a rank, its first."""
        peer.ended = True
        self._events.append(_Event(time.monotonic(), crashed, ruling))

    def _note_departure(self, peer: Peer, departure: Departure) -> bool:
        """Note a rank that leaves with an error; tells whether its text is new."""
        self._note(peer, failed(peer, departure), crashed=departure.crashed)
        words = hashlib.sha256(departure.text.encode("utf-8", "replace")).digest()
        is_new = words not in self._told
        self._told.add(words)
        return is_new

    def _judge(self) -> None:
        """Choose the first event once they have settled, and tell all ranks."""
        if self._bulletin.departure is not None and not self._own.ended:
            self._bulletin.answer(is_new=self._note_departure(self._own, self._bulletin.departure))
        everyone = [self._own, *self._peers.values()]
        for peer in everyone[1:]:
            if not peer.ended and peer.silence() > self._limits.timeout_seconds:
                self._note(peer, silent(peer, self._limits), crashed=False)
                for link in [link for link in self._links.values() if link.peer is peer]:
                    self._drop(link)  # should it go on after all, it learns that it is not part of the run
        if not self._events and min(peer.still() for peer in everyone) > self._limits.stall_seconds:
            self._events.append(_Event(time.monotonic(), False, stuck(everyone, self._limits)))
        if self._bulletin.ruling is None and self._events and time.monotonic() - self._events[0].at > SETTLE_SECONDS:
            first = min(self._events, key=lambda event: (event.crashed, event.at))
            self._broadcast(_said(first.ruling))
            self._bulletin.rule(first.ruling)
        if all(peer.ended for peer in everyone[1:]) and not self._links:
            self._bulletin.alone.set()

    def _broadcast(self, message: dict[str, Any]) -> None:
        for link in list(self._links.values()):
            if link.peer is not None:
                self._send(link, message)

    def _send(self, link: _Link, message: dict[str, Any]) -> None:
        """Send what fits into the buffer of the connection: a frozen peer reads nothing, and holds up nobody."""
        with suppress(OSError):
            link.connection.send(line_of(message))

    def _say_goodbye(self) -> None:
        """Tell all ranks that this is the end of the run, and keep their connections until they have said so."""
        self._broadcast({"end": True})
        end = time.monotonic() + GOODBYE_SECONDS
        while not all(peer.ended for peer in self._peers.values()) and time.monotonic() < end:
            self._listen()
        for connection in (self._door, *self._links):
            connection.close()
        self._selector.close()


def _said(ruling: Ruling) -> dict[str, Any]:
    return {"ruling": [ruling.rank, ruling.code, ruling.text, ruling.at_once]}
