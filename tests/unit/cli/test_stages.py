"""What rank 0 does for all, and agreement of the ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from exo_megatron.cli.stages import check_agreement, load_function, on_main
from exo_megatron.errors import ConfigError, DataError


@dataclass
class Rank:
    """One rank of a world; `others` are the values that further ranks contribute, `sent` what rank 0 broadcast."""

    rank: int = 0
    others: list[Any] = field(default_factory=list)
    sent: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather_objects(self, value):
        return [value, *self.others] if self.is_main else None

    def broadcast_object(self, value, source=0):
        if self.is_main:
            self.sent = value
        return self.sent


def test_work_is_done_once_and_its_result_is_everywhere():
    main = Rank(0)
    assert on_main(main, lambda: 42) == 42
    peer = Rank(1, sent=main.sent)

    def never():
        raise AssertionError

    assert on_main(peer, never) == 42


def test_an_error_of_rank_0_is_raised_everywhere():
    def fail():
        raise DataError("d:1", "bad", expected="good", fix="mend")

    main = Rank(0)
    with pytest.raises(DataError, match="d:1: bad; expected good; fix: mend"):
        on_main(main, fail)
    with pytest.raises(DataError, match="d:1: bad; expected good; fix: mend"):
        on_main(Rank(1, sent=main.sent), fail)


def test_ranks_with_other_settings_or_versions():
    from exo_megatron import __version__

    check_agreement("a", Rank(others=[("a", __version__)]))
    with pytest.raises(ConfigError, match="rank 2: its configuration differs"):
        check_agreement("a", Rank(others=[("a", __version__), ("b", __version__)]))
    with pytest.raises(ConfigError, match="rank 1: its version of exo-megatron differs"):
        check_agreement("a", Rank(others=[("a", "0.0.0")]))


def test_targets():
    assert load_function("exo_megatron.cli.stages:load_function") is load_function
