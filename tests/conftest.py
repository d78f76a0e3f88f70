"""What holds for every test: one thread per process, and no launcher around the test run itself."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

LONGEST_FIRST = (
    "multiprocess/test_align_parity.py",
    "multiprocess/test_rollout.py",
    "multiprocess/test_families.py",
    "multiprocess/test_resume.py",
    "multiprocess/test_family_gradients.py",
    "multiprocess/test_experts.py",
    "fake_cuda",
    "emulated_cuda",
    "unit/bench",
    "unit/frontier",
    "unit/packaging",
    "unit/diagnosis",
)
"""Files and folders whose tests take minutes. Files are handed to the workers in order, and a long one at the end would
keep one of them busy alone."""

# Before torch is imported anywhere. The tests start several processes on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

# Tokenised data of tests, in one place for all workers, which goes when the process ends that made it.
if "EXO_TEST_CACHE" not in os.environ:
    os.environ["EXO_TEST_CACHE"] = tempfile.mkdtemp(prefix="exo-test-cache-")
    atexit.register(shutil.rmtree, os.environ["EXO_TEST_CACHE"], ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = os.environ["EXO_TEST_CACHE"]

# pytest may itself run inside a Slurm job or under a launcher; the code under test must not take that for its own.
for _name in list(os.environ):
    if _name.startswith(("SLURM_", "OMPI_", "PMI_", "PMIX_")) or _name in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
        del os.environ[_name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files, the longest first; the tests of a file keep theirs."""
    items.sort(key=lambda item: _rank(item.path.relative_to(Path(__file__).parent).as_posix()))


def _rank(path: str) -> int:
    return next((rank for rank, name in enumerate(LONGEST_FIRST) if path.startswith(name)), len(LONGEST_FIRST))
