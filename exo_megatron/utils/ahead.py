"""Making the next item of a sequence while the present one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

LARGE = 256 * 2**20
"""Bytes. An item above it is made only when all before it have been used, so that two of them are never in memory."""


def made_ahead(makers: Iterable[tuple[int, Callable[[], T]]]) -> Iterator[T]:
    """The results of the makers, in order; a thread makes one ahead of the one that is asked for.

    makers: bytes of the item and what makes it, called in a thread of its own. What it raises is raised here, in the
    item's place. Use the result without keeping it: `use(next(items))`.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        waiting: deque[Future[T]] = deque()
        for size, make in makers:
            if size > LARGE:
                while waiting:
                    yield waiting.popleft().result()
            waiting.append(thread.submit(make))
            if size > LARGE or len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
