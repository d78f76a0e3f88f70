"""Hidden states to log-probs: ours, the naive way, and megatron-core's cross entropy; and head and
loss of a group.

Forward and backward, fp32. Log-probs at equal positions (tools/bench/logprob_sides.py) run on one
and on two processes, each with a thread of its own; head and loss (tools/bench/head_loss.py) in
one. Peaks are bytes allocated above the start, on one rank, gradients included unless a buffer for
them exists beforehand.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.multiprocessing.spawn import ProcessContext, start_processes

from tools.bench import head_loss, logprob_sides
from tools.bench.logprob_sides import MEGATRON, NAIVE
from tools.bench.measured import Measured
from tools.bench.options import Options
from tools.bench.sides import Different
from tools.bench.table import Table

SIZE, QUICK_SIZE = logprob_sides.Size(2048, 512, 32768), logprob_sides.Size(64, 32, 1000)
GROUPS = (head_loss.Size(400, 50, 4, 512, 32000), head_loss.Size(400, 50, 4, 2048, 32000))
QUICK_GROUPS = (head_loss.Size(40, 5, 4, 32, 999),)
TIMEOUT_SECONDS = 3600.0
MIB = 2**20
# (tensor-parallel size, other side, ours) -> what the time and the memory ratio should reach.
TARGETS = {
    (2, NAIVE, logprob_sides.KEPT): "1.6x time",
    (2, NAIVE, logprob_sides.RECOMPUTED): "14x memory",
    (2, MEGATRON, logprob_sides.KEPT): "1x time",
    (2, MEGATRON, logprob_sides.RECOMPUTED): "3.5x memory",
}


def run(options: Options) -> Table:
    """Run the benchmark. See the module."""
    rows: list[tuple[str, ...]] = []
    size = QUICK_SIZE if options.quick else SIZE
    for ranks in (1, 2):
        if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
            continue
        measured = measure_in_world(ranks, size, options.rounds)
        for other in (NAIVE, MEGATRON):
            for ours in logprob_sides.MEMORY_MIB:
                target = TARGETS.get((ranks, other, ours), "")
                rows.append((f"TP{ranks}, {size}", *_cells(measured, other, ours), target))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    worst = 0.0
    for group in QUICK_GROUPS if options.quick else GROUPS:
        for buffer in (True, False):
            compared = head_loss.compare(group, device, options.rounds, buffer=buffer)
            worst = max(worst, compared.differences[head_loss.STRAIGHT])
            what = f"head + loss, {group}, gradient of W {'into its buffer' if buffer else 'a new tensor'}"
            for ours in head_loss.MEMORY_MIB:
                rows.append((what, *_cells(compared, head_loss.STRAIGHT, ours), "10x time, 35x memory"))
    return Table(
        "Hidden states to log-probs, forward and backward, fp32",
        ("what", "other", "ours", "time ratio", "memory ratio", "peaks, MiB", "gradient difference", "target"),
        rows,
        (
            "Median (range) of time ratios round by round; peak bytes above the start, on one rank.",
            "compute.logits_memory_mib: kept 1024 (default), recomputed 4; head + loss: partly kept 17, recomputed 1.",
            "Where the weight has megatron-core's gradient buffer, which exists before, ours adds to it directly;",
            "elsewhere the gradient of the weight counts on both sides. Gradients are compared with the naive side's,",
            f"those of head + loss with float64 (the straightforward way's own differ from it by {worst:.0e}).",
        ),
    )


def _cells(measured: Measured, other: str, ours: str) -> tuple[str, ...]:
    peaks = measured.peaks
    return (
        other,
        ours,
        measured.timings.shown(other, ours),
        f"{peaks[other] / peaks[ours]:.1f}",
        f"{peaks[other] / MIB:.1f}, {peaks[ours] / MIB:.1f}",
        f"{measured.differences[ours]:.1e}",
    )


def measure_in_world(
    ranks: int, size: logprob_sides.Size, rounds: int, tolerance: float = logprob_sides.TOLERANCE
) -> Measured:
    """Return rank 0's measurements of a world of so many processes, which have ended then.

    Raises Different.
    """
    with TemporaryDirectory(prefix="exo-bench-") as place:
        arguments = (ranks, _free_port(), size, rounds, tolerance, torch.get_num_threads(), Path(place))
        group: ProcessContext = start_processes(_rank, arguments, nprocs=ranks, join=False, start_method="spawn")
        try:
            deadline = time.monotonic() + TIMEOUT_SECONDS
            while not group.join(timeout=1.0):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{ranks} processes have not ended after {TIMEOUT_SECONDS:.0f} s")
        finally:
            for process in group.processes:
                if process.is_alive():
                    process.kill()
        result: Measured | Different = torch.load(Path(place) / "measured.pt", weights_only=False)
        if isinstance(result, Different):
            raise Different(f"TP{ranks}: {result}")
        return result


def _rank(
    rank: int, ranks: int, port: int, size: logprob_sides.Size, rounds: int, tolerance: float, threads: int, place: Path
) -> None:
    if ranks > 1:
        place_in_world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {key: str(value) for key, value in place_in_world.items()}
    torch.set_num_threads(threads)
    measured = logprob_sides.measure(size, rounds, tolerance)
    if rank == 0:
        torch.save(measured, place / "measured.pt")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
