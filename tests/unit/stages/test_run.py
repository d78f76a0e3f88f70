"""Agreement of the ranks, and the functions of the stages."""

from __future__ import annotations

import pytest

from exo_megatron.errors import ConfigError
from exo_megatron.stages.run import check_agreement, load_function
from tests.unit.conftest import Rank


def test_ranks_with_other_settings_or_versions():
    from exo_megatron import __version__

    check_agreement("a", Rank(others=[("a", __version__)]))
    with pytest.raises(ConfigError, match="rank 2: its configuration differs"):
        check_agreement("a", Rank(others=[("a", __version__), ("b", __version__)]))
    with pytest.raises(ConfigError, match="rank 1: its version of exo-megatron differs"):
        check_agreement("a", Rank(others=[("a", "0.0.0")]))


def test_targets():
    assert load_function("exo_megatron.stages.run:load_function") is load_function
