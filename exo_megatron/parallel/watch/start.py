"""The watch over the ranks of a world: who is lost, who failed first, and the end of those that wait for them.

A thread in every rank beats to a hub, a thread of rank 0, which beats back. A rank that is killed closes its
connection; one that is frozen, or whose node is gone, stops to beat. The hub rules what happened first and tells all
ranks, each of which says it in one line and leaves, wherever its main thread waits. A rank that loses rank 0 rules for
itself. This needs neither the store nor a process group: both hang with a frozen rank 0.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from exo_megatron.config.sections import RuntimeConfig
from exo_megatron.errors import WorldError, reason
from exo_megatron.parallel.launch import Launch
from exo_megatron.parallel.watch.bulletin import Bulletin, Departure
from exo_megatron.parallel.watch.hub import Hub
from exo_megatron.parallel.watch.member import Member, join_hub
from exo_megatron.parallel.watch.vitals import Vitals
from exo_megatron.parallel.watch.wire import listen

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

LINGER_SECONDS = 8.0
"""Seconds that rank 0 stays when it fails: its hub, and often the store, serve the ranks that fail later."""

CLOSE_SECONDS = 10.0


class Watch:
    """The watch of this rank."""

    def __init__(self, bulletin: Bulletin, thread: threading.Thread) -> None:
        self._bulletin = bulletin
        self._thread = thread

    def begin(self, what: str) -> None:
        """Note what this rank does from now on, for the line that tells of its loss."""
        self._bulletin.vitals.begin(what)

    def depart(self, code: int, text: str, *, crashed: bool) -> tuple[int, str]:
        """Say that this rank fails. Returns the exit code and the text that it must write, its own or the cause's.

        Rank 0 stays until the others have left, LINGER_SECONDS at most. Does not return if the watch ends the process.

        Args:
            code: exit code of the error.
            text: what is to be written about it; empty if another rank has written it.
            crashed: whether the error may be a consequence of what happened to a peer.
        """
        code, text = self._bulletin.depart(Departure(code, text, crashed))
        while not self._bulletin.may_tell():
            time.sleep(1.0)  # the thread that may ends this process
        return code, text

    def linger(self) -> None:
        """Wait on rank 0 for all others to leave, LINGER_SECONDS at most."""
        if self._bulletin.rank == 0:
            self._bulletin.alone.wait(LINGER_SECONDS)

    def close(self) -> None:
        """End the watch, after the last collective of the world."""
        self._bulletin.closing.set()
        self._thread.join(timeout=CLOSE_SECONDS)


def start_watch(launch: Launch, limits: RuntimeConfig, store: Store) -> Watch | None:
    """Start the watch over a world of several ranks; return None for one. Collective over the world.

    The main thread of the rank calls it. Raises WorldError if the hub of rank 0 cannot be reached.
    """
    if launch.world_size == 1:
        return None
    bulletin = Bulletin(launch.rank, Vitals("start"))
    serve = _open_hub(bulletin, launch, limits, store) if launch.rank == 0 else _join(bulletin, launch, limits, store)
    os.register_at_fork(after_in_child=serve.forget)
    thread = threading.Thread(target=serve.run, name="watch", daemon=True)
    thread.start()
    return Watch(bulletin, thread)


def _open_hub(bulletin: Bulletin, launch: Launch, limits: RuntimeConfig, store: Store) -> Hub:
    door, token = listen(launch.master_addr), secrets.token_hex(16)
    store.set("watch", json.dumps([door.getsockname()[1], token]))
    return Hub(bulletin, door, token, launch.world_size, limits)


def _join(bulletin: Bulletin, launch: Launch, limits: RuntimeConfig, store: Store) -> Member:
    found: Any = json.loads(store.get("watch"))
    port, token = int(found[0]), str(found[1])
    try:
        return Member(bulletin, join_hub(launch, port, token, limits), launch.world_size, limits)
    except OSError as error:
        raise WorldError(
            f"rank {launch.rank}, {socket.gethostname()}",
            f"cannot reach the watch of rank 0 at {launch.master_addr}:{port} ({reason(error)})",
            expected="ports that processes of this run may open to each other",
            fix="open the ports between the nodes, or set MASTER_ADDR to an address on their network",
        ) from None
