"""One item is made ahead of its use, and never two large ones."""

from __future__ import annotations

from threading import Event

import pytest

from exo_megatron.utils.ahead import LARGE, made_ahead


def test_next_item_is_made_while_the_present_one_is_used() -> None:
    made = [Event() for _ in range(4)]
    items = made_ahead((1, lambda i=i: made[i].set() or i) for i in range(4))
    assert next(items) == 0
    assert made[1].wait(10)
    assert not made[2].is_set()
    assert list(items) == [1, 2, 3]


def test_large_items_wait_for_the_use_of_those_before() -> None:
    made: list[int] = []
    items = made_ahead((size, lambda i=i: made.append(i) or i) for i, size in enumerate((1, LARGE + 1, 1)))
    assert next(items) == 0
    assert made == [0]
    assert next(items) == 1
    assert made == [0, 1]
    assert list(items) == [2]


def test_an_exception_comes_in_the_place_of_its_item() -> None:
    def fail() -> int:
        raise ValueError("broken")

    items = made_ahead([(1, lambda: 0), (1, fail), (1, lambda: 2)])
    assert next(items) == 0
    with pytest.raises(ValueError, match="broken"):
        next(items)
