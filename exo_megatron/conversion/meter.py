"""Progress of a conversion in bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from exo_megatron.utils.progress import Progress

_MEGABYTE = 10**6


class Sized(Protocol):
    """An object with a size in bytes."""

    @property
    def bytes(self) -> int:
        """Number of bytes."""
        ...


def total_bytes(entries: Iterable[Sized]) -> int:
    """Sum the bytes of entries."""
    return sum(entry.bytes for entry in entries)


class ByteMeter:
    """Progress of the whole conversion in megabytes, estimated by rank 0 from its share."""

    def __init__(self, label: str, mine: int, total: int, *, enabled: bool) -> None:
        self._progress = Progress(label, -(-total // _MEGABYTE), "MB", enabled=enabled)
        self._mine = max(mine, 1)
        self._total = total
        self._bytes = 0
        self._shown = 0

    def count(self, number: int) -> None:
        """Add the bytes that this rank has converted."""
        self._bytes += number
        shown = -(-self._bytes * self._total // self._mine // _MEGABYTE)
        self._progress.advance(shown - self._shown)
        self._shown = shown

    def close(self) -> None:
        """End the progress line."""
        self._progress.close()
