"""The state of a peer as another rank knows it, and the rulings that tell of its loss or its failure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime

from exo_megatron.config.sections import RuntimeConfig
from exo_megatron.errors import WorldError
from exo_megatron.parallel.watch.bulletin import Departure, Ruling
from exo_megatron.parallel.watch.vitals import UNKNOWN, Sign

AGAIN = "start the same command again, which goes on from what was saved"
SHOWN = 4
LONGEST_WHY = 160


class Peer:
    """A rank as another one knows it.

    Attributes:
        rank, host, pid: of the peer.
        sign: its last.
        ended: whether it has said that it came to the end of the run, or leaves.
    """

    def __init__(self, rank: int, host: str, pid: int) -> None:
        self.rank = rank
        self.host = host
        self.pid = pid
        self.sign: Sign = UNKNOWN
        self.ended = False
        self._heard, self._heard_at = time.monotonic(), datetime.now(UTC)

    def hear(self, sign: Sign) -> None:
        """Note a beat."""
        self.sign = sign
        self._heard, self._heard_at = time.monotonic(), datetime.now(UTC)

    def forgive(self, seconds: float) -> None:
        """Do not count a time in which the listener itself did not run."""
        if seconds > 0:
            self._heard = min(self._heard + seconds, time.monotonic())

    def silence(self) -> float:
        """Return the seconds since the last beat."""
        return time.monotonic() - self._heard

    def still(self) -> float:
        """Return the seconds since its main thread is known to have gone on."""
        return self.sign.still + self.silence()

    def name(self) -> str:
        """Name rank, node and process."""
        return f"rank {self.rank} ({self.host}, process {self.pid})"

    def last_seen(self) -> str:
        """Say when the peer was heard last."""
        return f"{self._heard_at:%Y-%m-%d %H:%M:%S} UTC"


def beat_seconds(limits: RuntimeConfig, world_size: int) -> float:
    """Return the time between two beats: rank 0 hears about a hundred a second at most."""
    return min(1.0 + world_size / 128, limits.timeout_seconds / 6)


def gone(peer: Peer) -> Ruling:
    """Return the ruling that a peer ended without a word: it was killed, or crashed outside of Python."""
    return _lost(
        peer,
        f"has ended without a word at {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC; {peer.sign.told()}",
        "every rank until the end of the run",
        f"see its log and its node, which may have killed it for want of memory; {AGAIN}",
    )


def silent(peer: Peer, limits: RuntimeConfig) -> Ruling:
    """Return the ruling that a peer has not beaten for the whole time that it may take."""
    return _lost(
        peer,
        f"gives no sign of life since {peer.last_seen()}; {peer.sign.told()}",
        f"one within {limits.timeout_seconds:g} s (runtime.timeout_seconds)",
        f"see whether its process is stopped and its node swaps or cannot be reached; {AGAIN}",
    )


def stuck(peers: Sequence[Peer], limits: RuntimeConfig) -> Ruling:
    """Return the ruling that no rank goes on: one that is not in a collective keeps the others waiting, or all wait."""
    busy = [peer for peer in peers if not peer.sign.waiting]
    blamed = busy if 0 < len(busy) < len(peers) else list(peers)
    told = "; ".join(f"{peer.name()}: {peer.sign.told()}" for peer in blamed[:SHOWN])
    error = WorldError(
        f"rank {', '.join(str(peer.rank) for peer in blamed[:SHOWN])}",
        f"no rank has gone on for {min(peer.still() for peer in peers):.0f} s; "
        f"{'it keeps' if len(blamed) == 1 else 'they keep'} the run waiting: {told}",
        expected=f"some progress within {limits.stall_seconds:g} s (runtime.stall_seconds)",
        fix=f"see what hangs there, such as a file system; raise runtime.stall_seconds if it is slow; {AGAIN}",
    )
    return Ruling(None, error.exit_code, f"exo-megatron: {error}", at_once=True)


def failed(peer: Peer, departure: Departure) -> Ruling:
    """Return the ruling that a peer leaves with an error, which it tells itself."""
    why = departure.text.strip().splitlines()[-1].removeprefix("exo-megatron: ")[:LONGEST_WHY]
    text = f"exo-megatron: stopped because {peer.name()} failed ({why})"
    return Ruling(peer.rank, departure.code, text, at_once=False)


def _lost(peer: Peer, problem: str, expected: str, fix: str) -> Ruling:
    error = WorldError(peer.name(), problem, expected=expected, fix=fix)
    return Ruling(peer.rank, error.exit_code, f"exo-megatron: {error}", at_once=True)
