"""The world of one program run: its process group, this process's rank and device."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store, TCPStore

from exo_megatron.errors import TopologyError
from exo_megatron.parallel import cpu_backend
from exo_megatron.parallel.launcher import Launch, Launcher, detect_launch

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=60)
"""Longer than rank 0 may need to read data or write a large checkpoint while the others wait."""


@dataclass(frozen=True)
class Runtime:
    """One per process, for the whole program."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    launcher: Launcher

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0 of the world, which prints and writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank of the world."""
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """The value of rank `source` (pickled), on every rank of the world."""
        box = [value]
        dist.broadcast_object_list(box, src=source)
        return box[0]

    def gather_objects(self, value: T) -> list[T] | None:
        """The values of all ranks in rank order, on rank 0; None elsewhere."""
        box: list[T] | None = [value] * self.world_size if self.is_main else None
        dist.gather_object(value, box, dst=0)
        return box


@contextmanager
def distributed_runtime(*, models: bool = True) -> Iterator[Runtime]:
    """Join the world that the launcher made: NCCL with one CUDA device per process, gloo without CUDA.

    Raises TopologyError if the launcher's variables are incomplete or there are fewer devices than local ranks.
    models: models will be run, for which megatron-core is imported and prepared (seconds). Else gloo and the CPU, also
    where CUDA is available: any number of processes.
    The group is destroyed at the end; after an exception it is left to the process's exit, because peers may be
    waiting in a collective.
    """
    # Said once by `exo-megatron doctor`, not by every process of every run.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*(not installed|Falling back).*")
    # megatron-core's distributed optimizer keeps gradients on views of its buffers, on purpose.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    # About a default of megatron-core 0.16's own, on every construction of a model.
    warnings.filterwarnings("ignore", message="full scope is deprecated")
    # Of every expert that is whole on its rank: tokens come to it by all-to-all, also under sequence parallelism.
    warnings.filterwarnings("ignore", message="`sequence_parallel` is set to `True`, but tensor model parallel size is")
    # torch 2.13 renames collectives that megatron-core and older torch versions know by these names only.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated.*", category=FutureWarning)
    # One hardware queue keeps tensor-parallel communication in order with the products it overlaps.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    launch = detect_launch()
    device = _choose_device(launch) if models else torch.device("cpu")
    if models:
        cpu_backend.install()
    _join(launch, device)
    runtime = Runtime(launch.rank, launch.world_size, launch.local_rank, device, launch.launcher)
    yield runtime
    runtime.barrier()  # a rank that leaves early takes its connections away under the others
    dist.destroy_process_group()


def _choose_device(launch: Launch) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # Slurm may bind one device to each task, which then is device 0 of every task.
    index = 0 if count == 1 and launch.launcher == "slurm" else launch.local_rank
    if index >= count:
        raise TopologyError(
            "launcher",
            f"local rank {launch.local_rank} has no CUDA device ({count} visible)",
            expected=f"at most {count} processes on this node",
            fix="start one process per GPU",
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _join(launch: Launch, device: torch.device) -> None:
    store: Store | None = None
    if launch.launcher == "single":
        store = HashStore()
    elif launch.launcher == "mpi":
        store = _mpi_store(launch)
    else:
        os.environ["MASTER_ADDR"] = launch.master_addr
        os.environ["MASTER_PORT"] = str(launch.master_port)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,  # None: from the environment, where torchrun may already keep a store
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )


def _mpi_store(launch: Launch) -> Store:
    """The store through which ranks meet: rank 0 takes a free port and tells it over MPI."""
    from mpi4py import MPI

    world, size = MPI.COMM_WORLD, launch.world_size
    if launch.rank == 0:
        store = TCPStore(launch.master_addr, launch.master_port, size, is_master=True, wait_for_workers=False)
        world.bcast(store.port, root=0)
        return store
    return TCPStore(launch.master_addr, world.bcast(None, root=0), size, is_master=False)
