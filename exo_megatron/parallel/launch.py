"""The rank of this process and the address of rank 0, which the launcher tells it."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from exo_megatron.errors import TopologyError

Launcher = Literal["single", "torchrun", "slurm", "mpi"]

LAST_PORT = 65535
LONGEST_NUMBER = 18
"""Digits of a launcher's number."""


@dataclass(frozen=True)
class Launch:
    """Rank of this process, and the address at which rank 0 listens.

    Without a launcher: one process, no address. Port 0 under mpirun: rank 0 takes a free one and
    broadcasts it.
    """

    launcher: Launcher
    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int


def detect_launch(env: Mapping[str, str] = os.environ) -> Launch:
    """Read the environment that torchrun, srun or mpirun made; without any of them, one process.

    torchrun inside an srun step counts as torchrun. A plain `python` in a batch script (no srun
    step) is one process. Under mpirun the ranks agree on the address with one broadcast over
    MPI_COMM_WORLD. Raises TopologyError, which names the variable, if a launcher set only part of what is
    needed, or something that is no number or out of range.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return _torchrun(env)
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        return _slurm(env)
    if any(name in env for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")):
        return _mpi(env)
    return Launch("single", 0, 1, 0, "127.0.0.1", 0)


def _torchrun(env: Mapping[str, str]) -> Launch:
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise TopologyError(
            "environment",
            f"RANK and WORLD_SIZE are set but {', '.join(missing)} not",
            expected="RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT",
            fix="start with torchrun, or unset RANK and WORLD_SIZE",
        )
    if not env["MASTER_ADDR"].strip():
        raise _wrong("MASTER_ADDR", "is empty", "the address of the machine of rank 0")
    world_size = _number(env, "WORLD_SIZE", 1)
    return Launch(
        "torchrun",
        _number(env, "RANK", 0, world_size - 1),
        world_size,
        _number(env, "LOCAL_RANK", 0, world_size - 1),
        env["MASTER_ADDR"].strip(),
        _number(env, "MASTER_PORT", 1, LAST_PORT),
    )


def _slurm(env: Mapping[str, str]) -> Launch:
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    world_size = _number(env, tasks, 1) if tasks in env else 1
    # Ports below 20000 and above 52000 are left to services and to ephemeral connections.
    job = _number(env, "SLURM_JOB_ID", 0) if "SLURM_JOB_ID" in env else 0
    port = _number(env, "MASTER_PORT", 1, LAST_PORT) if "MASTER_PORT" in env else 20000 + job % 32000
    return Launch(
        "slurm",
        _number(env, "SLURM_PROCID", 0, world_size - 1),
        world_size,
        _number(env, "SLURM_LOCALID", 0, world_size - 1) if "SLURM_LOCALID" in env else 0,
        env.get("MASTER_ADDR", "").strip() or _first_slurm_host(env),
        port,
    )


def _first_slurm_host(env: Mapping[str, str]) -> str:
    count = "SLURM_STEP_NUM_NODES" if "SLURM_STEP_NUM_NODES" in env else "SLURM_NNODES"
    if count not in env or _number(env, count, 1) == 1:
        return "127.0.0.1"
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", ""))
    try:
        answer = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise TopologyError(
            "environment",
            f"MASTER_ADDR is not set and `scontrol show hostnames {nodes}` failed ({error})",
            expected="the address of the first node in MASTER_ADDR",
            fix="export MASTER_ADDR=ADDRESS in the batch script, before srun",
        ) from error
    hosts = answer.stdout.split()
    if not hosts:
        raise _wrong("SLURM_STEP_NODELIST", f"{nodes!r} names no node", "the nodes of the step")
    return hosts[0]


def _mpi(env: Mapping[str, str]) -> Launch:
    port = _number(env, "MASTER_PORT", 0, LAST_PORT) if "MASTER_PORT" in env else 0
    _check_mpi(env)  # before MPI reads them, which ends the process in its own words
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise TopologyError(
            "environment",
            f"started by mpirun, but mpi4py cannot be imported ({error})",
            expected="mpi4py and the MPI runtime of this mpirun",
            fix="pip install 'exo-megatron[mpi]', or start with torchrun",
        ) from error
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    here = "127.0.0.1" if node.Get_size() == world.Get_size() else socket.gethostname()
    host = world.bcast(env.get("MASTER_ADDR", "").strip() or here, root=0)
    return Launch("mpi", world.Get_rank(), world.Get_size(), node.Get_rank(), host, port)


def _check_mpi(env: Mapping[str, str]) -> None:
    for rank, size in (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")):
        last = _number(env, size, 1) - 1 if size in env else None
        if rank in env:
            _number(env, rank, 0, last)
    for name in ("PMIX_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if name in env:
            _number(env, name, 0)


def _number(env: Mapping[str, str], name: str, least: int, most: int | None = None) -> int:
    """Return the number in a variable that is set. Raises TopologyError unless it is one, and in its range."""
    value = env[name].strip()
    among = f"a whole number from {least}" + ("" if most is None else f" to {most}")
    if not (value.isascii() and value.isdigit()) or len(value) > LONGEST_NUMBER:
        raise _wrong(name, f"is {env[name][:40]!r}", among)
    if int(value) < least or (most is not None and int(value) > most):
        raise _wrong(name, f"is {value}", among)
    return int(value)


def _wrong(name: str, problem: str, expected: str) -> TopologyError:
    return TopologyError(
        f"environment: {name}",
        problem,
        expected=expected,
        fix="start with torchrun, srun or mpirun, or unset the variables of a launcher for a single process",
    )
