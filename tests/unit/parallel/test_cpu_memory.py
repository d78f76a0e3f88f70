"""Large tensors on the CPU come in huge pages, whatever is imported before the first of them, and are used again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FAULTS = """
import resource
import exo_megatron.training.trainer
import torch
from exo_megatron.parallel.cpu_backend import keep_memory
keep_memory()
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> list[int]:
    """Page faults of 64 MiB, time after time."""
    without = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FAULTS],
        env={**without, **environment, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text(), reason="the kernel gives huge pages to all or none"
)
def test_huge_pages_that_are_kept() -> None:
    in_small_pages = faults(THP_MEM_ALLOC_ENABLE="0")
    assert min(in_small_pages) >= 2**26 // 4096
    found = faults()
    assert max(found) < min(in_small_pages) / 4
    assert found[-1] < 100  # the first few may lie across what is there already
