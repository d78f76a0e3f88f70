"""The importing process, one for all tests that run in a process of pytest's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fake_cuda.libraries import build, folder_of_run, reason_to_skip
from tests.fake_cuda.server import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    reason = reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    server = Server(build(folder_of_run(tmp_path_factory)), tmp_path_factory.mktemp("cases"))
    yield server
    server.close()
