"""The small models of `doctor --gpu --cpu` and its checks by name, once for all tests."""

from __future__ import annotations

import pytest

from exo_megatron.diagnosis.checklist import SIZES, correctness_checks
from exo_megatron.diagnosis.run import make_site
from exo_megatron.parallel.runtime import distributed_runtime


@pytest.fixture(scope="module")
def runtime():
    with distributed_runtime() as runtime:
        yield runtime


@pytest.fixture(scope="module")
def correctness(runtime, tmp_path_factory):
    """Name -> check."""
    sizes = SIZES["cpu"]
    site = make_site(runtime, tmp_path_factory.mktemp("doctor"), sizes.small)
    return {check.name: check for check in correctness_checks(site, sizes)}
