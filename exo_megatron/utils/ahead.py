"""Preparation of the next item of a sequence, in a thread, while the present one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

LARGE = 256 * 2**20
"""Bytes. A larger item is made only after all earlier ones are used, to hold one at a time."""


def made_ahead(makers: Iterable[tuple[int, Callable[[], T]]]) -> Iterator[T]:
    """Yield the results of the makers in order; a thread makes one item ahead of the present one.

    `makers` holds the bytes of each item and the function that makes it, called in the thread. Its
    exceptions are raised here, at the item's turn. Do not keep a result while asking for the next
    one: `use(next(items))`.
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
