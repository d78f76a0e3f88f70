"""The meeting of the ranks of a world: all come within a set time, or everybody is told who is missing."""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from exo_megatron.errors import ExoError, TopologyError, WorldError, reason
from exo_megatron.parallel.launch import Launch

STORE_TIMEOUT = timedelta(minutes=60)
"""Of an operation on the store once all have met; torch's own groups exchange their addresses through it."""

VERDICT_SECONDS = 20.0
"""Seconds that a rank waits for what rank 0 says of the others, over the time that rank 0 gives them."""

RETRY_SECONDS = 0.5
SHOWN_RANKS = 8


def meet(launch: Launch, seconds: float) -> Store:
    """Open the store of the world, and wait in it until all ranks have come. Collective over the world.

    Rank 0 keeps the store, or torchrun's agent does.

    Args:
        launch: rank of this process and address of rank 0.
        seconds: time that rank 0 gives all others to come, and that they give rank 0.

    Raises:
        TopologyError: the host of rank 0 is unknown, a rank was started twice, or ranks were started for worlds of
            different sizes.
        WorldError: a rank has not come, or the store cannot be opened.
    """
    deadline = time.monotonic() + seconds
    try:
        store = _open_mpi(launch) if launch.launcher == "mpi" else _open(launch, deadline)
        _check_in(store, launch)
        if launch.rank == 0:
            failure = _await_all(store, launch.world_size, deadline)
            store.set("met", "" if failure is None else json.dumps(_fields(failure)))
            if failure is not None:
                _let_them_read(store, launch.world_size)
                raise failure
        else:
            _read_verdict(store, seconds)
    except (RuntimeError, ValueError) as error:  # torch's errors of its store
        raise _no_world(launch, f"the store of the ranks fails ({reason(error)})") from None
    store.set_timeout(STORE_TIMEOUT)
    return store


def _open(launch: Launch, deadline: float) -> Store:
    """Open the store at the address of rank 0. torchrun's agent keeps it from one attempt to the next."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    left = timedelta(seconds=max(deadline - time.monotonic(), 1.0))
    if launch.rank == 0 and not agent:
        _resolve(launch, deadline)
        store = TCPStore(
            launch.master_addr, launch.master_port, launch.world_size, True, timeout=left, wait_for_workers=False
        )
    else:
        _reach(launch, deadline)
        store = TCPStore(launch.master_addr, launch.master_port, launch.world_size, False, timeout=left)
    return PrefixStore(f"exo-megatron/{attempt}", store)


def _open_mpi(launch: Launch) -> Store:
    """Open the store on a free port that rank 0 broadcasts over MPI."""
    from mpi4py import MPI

    world, size = MPI.COMM_WORLD, launch.world_size
    if launch.rank == 0:
        store = TCPStore(launch.master_addr, launch.master_port, size, is_master=True, wait_for_workers=False)
        world.bcast(store.port, root=0)
        return store
    return TCPStore(launch.master_addr, world.bcast(None, root=0), size, is_master=False)


def _resolve(launch: Launch, deadline: float) -> None:
    """Wait until the host of rank 0 has an address: a cluster may give it one only once it runs."""
    while True:
        try:
            socket.getaddrinfo(launch.master_addr, launch.master_port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise TopologyError(
                    "environment: MASTER_ADDR",
                    f"the host {launch.master_addr!r} of rank 0 has no address ({reason(error)})",
                    expected="a name or address that all nodes know",
                    fix="export MASTER_ADDR with the address of the node of rank 0",
                ) from None
            time.sleep(RETRY_SECONDS)
        else:
            return


def _reach(launch: Launch, deadline: float) -> None:
    """Wait until somebody listens where rank 0 should."""
    _resolve(launch, deadline)
    while True:
        try:
            socket.create_connection((launch.master_addr, launch.master_port), timeout=5.0).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise _no_world(launch, f"rank 0 cannot be reached ({reason(error)})") from None
            time.sleep(RETRY_SECONDS)
        else:
            return


def _no_world(launch: Launch, problem: str) -> WorldError:
    return WorldError(
        f"rank {launch.rank} of {launch.world_size}, {socket.gethostname()}",
        f"no world at {launch.master_addr}:{launch.master_port}: {problem}",
        expected="rank 0 listening there and a free port for it",
        fix="see whether rank 0 was started and runs, and choose another MASTER_PORT if this one is taken",
    )


def _check_in(store: Store, launch: Launch) -> None:
    if store.add(f"came/{launch.rank}", 1) > 1:
        raise TopologyError(
            f"rank {launch.rank}, {socket.gethostname()}",
            f"another process was started as rank {launch.rank}, too",
            expected="every rank once",
            fix="correct RANK (SLURM_PROCID) of the processes, or take a MASTER_PORT that no other run uses",
        )
    store.set(f"seat/{launch.rank}", json.dumps([socket.gethostname(), launch.world_size]))
    store.add("arrived", 1)


def _await_all(store: Store, world_size: int, deadline: float) -> ExoError | None:
    """Wait on rank 0 for the others. Returns None once all are there, else what is wrong with the world."""
    while store.add("arrived", 0) < world_size and time.monotonic() < deadline:
        time.sleep(0.05)
    here = [rank for rank in range(world_size) if store.check([f"seat/{rank}"])]
    seats = {rank: json.loads(store.get(f"seat/{rank}")) for rank in here}
    for rank, (host, size) in seats.items():
        if size != world_size:
            return TopologyError(
                f"rank {rank}, {host}",
                f"was started for a world of {size}, rank 0 for one of {world_size}",
                expected="one number of processes on all ranks",
                fix="correct WORLD_SIZE (SLURM_NTASKS)",
            )
    missing = [rank for rank in range(world_size) if rank not in seats]
    if not missing:
        return None
    hosts = ", ".join(dict.fromkeys(host for host, _ in seats.values()))
    return WorldError(
        f"rank{'s' if len(missing) > 1 else ''} {_shown(missing)}",
        f"did not come; the {len(here)} of {world_size} ranks that did are on {hosts}",
        expected=f"all {world_size} processes within runtime.start_seconds after rank 0",
        fix="see what the launcher and the logs of these ranks say; raise runtime.start_seconds if they start slowly",
    )


def _shown(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:SHOWN_RANKS])) + (", ..." if len(ranks) > SHOWN_RANKS else "")


def _read_verdict(store: Store, seconds: float) -> None:
    """Wait for what rank 0 says of the others, and raise it if they have not come."""
    store.wait(["met"], timedelta(seconds=seconds + VERDICT_SECONDS))
    verdict = store.get("met").decode()
    store.add("read", 1)
    if verdict:
        kind, where, problem, expected, fix = json.loads(verdict)
        known = {each.__name__: each for each in (TopologyError, WorldError)}
        raise known[kind](where, problem, expected=expected, fix=fix)


def _let_them_read(store: Store, world_size: int) -> None:
    """Keep the store until those that came have read what is wrong, two seconds at most."""
    end = time.monotonic() + 2.0
    others = sum(store.check([f"seat/{rank}"]) for rank in range(1, world_size))
    while store.add("read", 0) < others and time.monotonic() < end:
        time.sleep(0.05)


def _fields(failure: ExoError) -> list[str]:
    return [type(failure).__name__, failure.where, failure.problem, failure.expected, failure.fix]
