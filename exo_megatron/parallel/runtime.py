"""The world of one program run: this process's rank, its process group and device."""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import socket
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from exo_megatron.config.sections import RuntimeConfig
from exo_megatron.errors import TopologyError
from exo_megatron.parallel import cpu_backend
from exo_megatron.parallel.launch import Launch, Launcher, detect_launch
from exo_megatron.parallel.leaving import leaving_together
from exo_megatron.parallel.rendezvous import meet
from exo_megatron.parallel.watch.start import Watch, start_watch
from exo_megatron.utils.team import Team

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=60)
"""Longer than rank 0 may need to read data or write a large checkpoint while the others wait."""

CHUNK_BYTES = 4 * 2**20
"""Bytes of pickled items that travel as one message, if a single item has no more."""


class _World:
    """The gloo group for Python objects, which NCCL would put on every rank's GPU."""

    objects: ClassVar[dist.ProcessGroup | None] = None


def objects_group() -> dist.ProcessGroup | None:
    """Return the group for Python objects; None, which stands for the default one, without a world."""
    return _World.objects


def share_object(value: T) -> list[T]:
    """Gather the small values of all ranks (pickled) in rank order on every rank of the world."""
    box = [value] * dist.get_world_size()
    dist.all_gather_object(box, value, group=_World.objects)
    return box


@dataclass(frozen=True)
class Runtime:
    """This process in the world of the program: one object for the whole run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    launcher: Launcher
    watch: Watch | None = None

    @property
    def is_main(self) -> bool:
        """True on rank 0 of the world, which prints and writes files."""
        return self.rank == 0

    def begin(self, what: str) -> None:
        """Note what this rank does from now on, for the line that tells of its loss. Costs an assignment."""
        if self.watch is not None:
            self.watch.begin(what)

    def barrier(self) -> None:
        """Wait for every rank of the world."""
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def team(self) -> Team:
        """Return this process among those of the world and of its node. Collective over the world."""
        nodes = share_object(socket.gethostname())
        here = [rank for rank, node in enumerate(nodes) if node == nodes[self.rank]]
        return Team(self.rank, self.world_size, here.index(self.rank), len(here), share_object)

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """Return the value of rank `source` (pickled, small) on every rank of the world."""
        box = [value]
        dist.broadcast_object_list(box, src=source, group=_World.objects)
        return box[0]

    def gather_objects(self, value: T) -> list[T] | None:
        """Gather the values of all ranks (pickled) in rank order on rank 0; None elsewhere.

        Collective over the world. All are padded to the largest, which must be small.
        """
        box: list[T] | None = [value] * self.world_size if self.is_main else None
        dist.gather_object(value, box, dst=0, group=_World.objects)
        return box

    def broadcast_items(self, items: Sequence[T]) -> list[T]:
        """Return the items of rank 0 on every rank, in their order.

        Collective over the world, in messages of about CHUNK_BYTES. Other ranks' are not read.
        """
        if self.is_main:
            for chunk in _chunks(items):
                self.broadcast_object(chunk)
            self.broadcast_object(b"")
            return list(items)
        received: list[T] = []
        while chunk := self.broadcast_object(b""):
            received += _unpacked(chunk)
        return received

    def gather_items(self, items: Sequence[T]) -> list[T] | None:
        """Gather the items of all ranks on rank 0, those of rank 0 first; None elsewhere.

        Collective over the world. One rank after another sends messages of about CHUNK_BYTES.
        """
        if not self.is_main:
            for chunk in _chunks(items):
                _send(chunk)
            _send(b"")
            return None
        gathered = list(items)
        for rank in range(1, self.world_size):
            while chunk := _receive(rank):
                gathered += _unpacked(chunk)
        return gathered


def _chunks(items: Iterable[object]) -> Iterator[bytes]:
    """Yield pickled items, one after another, in pieces of CHUNK_BYTES or of a single larger item."""
    pending: list[bytes] = []
    size = 0
    for item in items:
        pickled = pickle.dumps(item)
        if pending and size + len(pickled) > CHUNK_BYTES:
            yield b"".join(pending)
            pending, size = [], 0
        pending.append(pickled)
        size += len(pickled)
    if pending:
        yield b"".join(pending)


def _unpacked(chunk: bytes) -> Iterator[T]:
    stream = io.BytesIO(chunk)
    while stream.tell() < len(chunk):
        yield pickle.load(stream)  # noqa: S301  # of our own ranks, as in torch's object collectives


def _send(chunk: bytes) -> None:
    dist.send(torch.tensor([len(chunk)]), dst=0, group=_World.objects)
    if chunk:
        dist.send(torch.frombuffer(bytearray(chunk), dtype=torch.uint8), dst=0, group=_World.objects)


def _receive(rank: int) -> bytes:
    size = torch.zeros(1, dtype=torch.int64)
    dist.recv(size, src=rank, group=_World.objects)
    chunk = torch.empty(int(size), dtype=torch.uint8)
    if size:
        dist.recv(chunk, src=rank, group=_World.objects)
    return chunk.numpy().tobytes()


@contextmanager
def distributed_runtime(limits: RuntimeConfig | None = None, *, models: bool = True) -> Iterator[Runtime]:
    """Join the launcher's world: NCCL with one CUDA device per process, gloo without CUDA.

    Args:
        limits: how long ranks wait for each other; the defaults if it is None.
        models: whether models will be run, for which megatron-core is imported and prepared (seconds). If not,
            gloo and the CPU are used, also where CUDA is available, with any number of processes.

    The group is destroyed at the end. After an exception in a world of several ranks this process ends here
    (see `leaving_together`), because peers may be waiting in a collective. A Transformer Engine that is
    installed but cannot be used is named in one line on rank 0.

    Raises:
        TopologyError: the launcher's variables are incomplete or wrong; a node has fewer devices than processes, or
            only some ranks can use Transformer Engine.
        WorldError: a rank does not come.
    """
    limits = RuntimeConfig() if limits is None else limits
    # `exo-megatron doctor` says this once; it need not be repeated by every process of every run.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*(not installed|Falling back).*")
    # megatron-core's distributed optimizer keeps gradients on views of its buffers, on purpose.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    # Emitted on every construction of a model, about a default of megatron-core 0.16 itself.
    warnings.filterwarnings("ignore", message="full scope is deprecated")
    # Emitted for every expert that is whole on its rank. Tokens reach it by all-to-all, also under
    # sequence parallelism.
    warnings.filterwarnings("ignore", message="`sequence_parallel` is set to `True`, but tensor model parallel size is")
    # torch 2.13 renames collectives that megatron-core and older torch versions know by these names
    # only.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated.*", category=FutureWarning)
    # One hardware queue keeps tensor-parallel communication in order with the products it overlaps.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    launch = detect_launch()
    failure = _engine_failure()
    device = _choose_device(launch) if models else torch.device("cpu")
    if models:
        cpu_backend.install()
    watch = None
    store: Store = HashStore()
    if launch.launcher != "single":
        store = meet(launch, limits.start_seconds)
        watch = start_watch(launch, limits, store)
    with nullcontext() if watch is None else leaving_together(launch.rank, watch):
        _make_groups(launch, device, store, failure)
        if failure is not None and launch.rank == 0:
            told = f"Transformer Engine cannot be used ({failure}); this run takes slower kernels"
            print(f"exo-megatron: {told}; see `exo-megatron doctor`", file=sys.stderr, flush=True)
        runtime = Runtime(launch.rank, launch.world_size, launch.local_rank, device, launch.launcher, watch)
        yield runtime
        runtime.barrier()  # a rank that leaves early takes its connections away under the others
    if watch is not None:
        watch.close()
    _World.objects = None
    dist.destroy_process_group()


def _engine_failure() -> str | None:
    """Return why Transformer Engine, though installed, is not used; see `settle_engine`."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    from exo_megatron.parallel.engine import settle_engine

    return settle_engine()


def _choose_device(launch: Launch) -> torch.device:
    """Choose the device of this rank, which may not be there: `check_seats` tells all ranks."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # A launcher or a script may show each process a device of its own: number 0 of each of them.
    device = torch.device("cuda", 0 if count == 1 else launch.local_rank)
    if device.index < count:
        torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class Seat:
    """A rank's node and CUDA device, and why it cannot use its Transformer Engine, if so.

    gpu: UUID of the device; "" if no device is visible under its number; None for the CPU.
    """

    host: str
    gpu: str | None
    engine_failure: str | None


def _take_seat(device: torch.device, engine_failure: str | None) -> Seat:
    gpu = None
    if device.type == "cuda":
        there = device.index < torch.cuda.device_count()
        gpu = str(torch.cuda.get_device_properties(device).uuid) if there else ""
    return Seat(socket.gethostname(), gpu, engine_failure)


def check_seats(seats: Sequence[Seat]) -> None:
    """Raise TopologyError if ranks lack or share a device, or only some have Transformer Engine.

    seats: of all ranks of the world, so that all ranks raise or none.
    """
    for host in dict.fromkeys(seat.host for seat in seats if seat.gpu is not None):
        here = [seat.gpu for seat in seats if seat.host == host]
        devices = len(set(here) - {""})
        if devices < len(here):
            raise TopologyError(
                f"launcher, node {host}",
                f"started {len(here)} processes, which see {devices} different CUDA devices",
                expected=f"at most {devices} processes on this node",
                fix=f"start one per GPU (torchrun --nproc-per-node {devices}, srun --ntasks-per-node {devices})",
            )
    failed = [(rank, seat) for rank, seat in enumerate(seats) if seat.engine_failure is not None]
    if failed and len(failed) < len(seats):
        rank, seat = failed[0]
        raise TopologyError(
            f"rank {rank}, node {seat.host}",
            f"cannot use Transformer Engine ({seat.engine_failure}), and other ranks can",
            expected="the same kernels on all ranks, whose results must agree",
            fix="repair it there, or uninstall it everywhere; see `exo-megatron doctor`",
        )


def _make_groups(launch: Launch, device: torch.device, store: Store, engine_failure: str | None) -> None:
    """Make the groups of all ranks, in the store in which they have met, and compare their devices."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("groups", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    _World.objects = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT, group_desc="objects")
    check_seats(share_object(_take_seat(device, engine_failure)))
