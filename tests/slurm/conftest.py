from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, running_cluster, why_unavailable


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A two-node Slurm, or a skip that says what is missing."""
    reason = why_unavailable()
    if reason:
        pytest.skip(reason)
    with running_cluster() as running:
        yield running
