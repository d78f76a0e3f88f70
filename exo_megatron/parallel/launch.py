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
    MPI_COMM_WORLD. Raises TopologyError if a launcher set only part of what is needed.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return _torchrun(env)
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) >= 1:
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
    return Launch(
        "torchrun",
        int(env["RANK"]),
        int(env["WORLD_SIZE"]),
        int(env["LOCAL_RANK"]),
        env["MASTER_ADDR"],
        int(env["MASTER_PORT"]),
    )


def _slurm(env: Mapping[str, str]) -> Launch:
    world_size = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
    # Ports below 20000 and above 52000 are left to services and to ephemeral connections.
    port = int(env["MASTER_PORT"]) if "MASTER_PORT" in env else 20000 + int(env.get("SLURM_JOB_ID", "0")) % 32000
    return Launch(
        "slurm",
        int(env["SLURM_PROCID"]),
        world_size,
        int(env.get("SLURM_LOCALID", "0")),
        env.get("MASTER_ADDR") or _first_slurm_host(env),
        port,
    )


def _first_slurm_host(env: Mapping[str, str]) -> str:
    if int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1"))) == 1:
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
    return answer.stdout.split()[0]


def _mpi(env: Mapping[str, str]) -> Launch:
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
    host = world.bcast(env.get("MASTER_ADDR") or here, root=0)
    port = int(env.get("MASTER_PORT", "0"))
    return Launch("mpi", world.Get_rank(), world.Get_size(), node.Get_rank(), host, port)
