"""The harness reports values, failures and hangs, and goes on after them."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from exo_megatron.parallel.runtime import Runtime
from tests.multiprocess.harness import Check, WorldFailure, run_checks

HERE = "tests.multiprocess.test_harness_selfcheck"


def sum_of_ranks(runtime: Runtime, *, add: int) -> float:
    total = torch.tensor(float(runtime.rank + add))
    dist.all_reduce(total)
    return total.item()


def fails_on_rank_one(runtime: Runtime) -> None:
    if runtime.rank == 1:
        raise ValueError("rank one refuses")
    runtime.barrier()


def compilers(runtime: Runtime) -> tuple[bool, bool]:
    """Whether torch's compiler has been imported, and whether `torch.compile` is torch's own."""
    return "torch._inductor.compile_fx" in sys.modules, torch.compile.__module__ == "torch"


def test_values_failures_and_the_checks_after_them(tmp_path: Path) -> None:
    checks = [
        Check("first", f"{HERE}:sum_of_ranks", {"add": 1}),
        Check("broken", f"{HERE}:fails_on_rank_one", {}),
        Check("compilers", f"{HERE}:compilers", {}),
        Check("last", f"{HERE}:sum_of_ranks", {"add": 2}),
    ]
    started = time.monotonic()
    outcomes = run_checks(2, checks, tmp_path)
    assert outcomes["first"].values() == (3.0, 3.0)
    assert outcomes["last"].values() == (5.0, 5.0)
    assert outcomes["compilers"].values() == ((False, True), (False, True))
    with pytest.raises(WorldFailure, match="rank one refuses"):
        outcomes["broken"].values()
    assert time.monotonic() - started < 120.0
