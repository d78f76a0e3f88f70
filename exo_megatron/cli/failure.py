"""How a run ends when it fails: one line for the user, the same exit on every rank, and nobody left waiting."""

from __future__ import annotations

import hashlib
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from exo_megatron.errors import ConfigError, ExoError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from exo_megatron.parallel.runtime import Runtime

FAILURE = 1
INTERRUPTED = 130
_STORE_PATIENCE = timedelta(seconds=5)
_LINGER_SECONDS = 2.0
"""Rank 0 often hosts the store through which ranks learn of each other's failure, so it leaves last."""


def exit_code(error: BaseException) -> int:
    """Exit code of the process that ends with this error."""
    if isinstance(error, ExoError):
        return error.exit_code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILURE


def report(error: BaseException) -> int:
    """Tell the user about an error outside a process group, and give the exit code.

    All ranks read the same configuration, so a ConfigError is told by rank 0 only.
    """
    if not (isinstance(error, ConfigError) and environment_rank(os.environ) != 0):
        _write(_text(error))
    return exit_code(error)


def leave_mpi(code: int) -> None:
    """End the process if MPI is up: the regular end waits in MPI_Finalize for ranks that may never come there."""
    if "mpi4py.MPI" in sys.modules:
        _exit_now(code)


def environment_rank(env: Mapping[str, str]) -> int:
    """Rank of this process as its launcher tells it, without starting anything; 0 without a launcher."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
    return next((int(env[name]) for name in names if env.get(name, "").isdigit()), 0)


@contextmanager
def leaving_together(runtime: Runtime) -> Iterator[None]:
    """End this process at once if the block fails while other ranks may be waiting for it in a collective.

    Destroying the process group could wait for them for ever, so the process exits without it; launchers then stop
    the other ranks. What several ranks have to say in the same words is said once, and ranks that fail only because
    a peer left say so in one line and exit with the peer's code. A lone process simply passes the exception on.
    """
    try:
        yield
    except BaseException as error:
        if runtime.world_size == 1:
            raise
        _leave(error, runtime)


def _leave(error: BaseException, runtime: Runtime) -> NoReturn:
    code = exit_code(error)
    try:
        code = _tell(error, runtime, _store())
    except Exception:
        # The store went with rank 0. What failed here then most likely failed because of that.
        _write(_text(error) if isinstance(error, ExoError) else _consequence(error, runtime.rank, "rank 0 is gone"))
    _exit_now(code)


def _exit_now(code: int) -> NoReturn:
    """Exit without the interpreter's clean-up, which may wait for peers."""
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _tell(error: BaseException, runtime: Runtime, store: Store) -> int:
    """Write what no other rank has written yet, and give the exit code."""
    code = exit_code(error)
    text = _text(error)
    first = store.add("exo/failures", 1) == 1
    if first:
        store.set("exo/first", f"{code} {runtime.rank}")
    if isinstance(error, ExoError):
        words = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
        if store.add(f"exo/said/{words}", 1) == 1:
            _write(text)
    elif first:
        _write(f"rank {runtime.rank}: {text}")
    else:
        code, rank = map(int, store.get("exo/first").decode().split())
        _write(_consequence(error, runtime.rank, f"rank {rank} failed"))
    if runtime.is_main:
        _wait_for_peers(store, runtime.world_size)
    return code


def _wait_for_peers(store: Store, world_size: int) -> None:
    end = time.monotonic() + _LINGER_SECONDS
    while store.add("exo/failures", 0) < world_size and time.monotonic() < end:
        time.sleep(0.05)


def _store() -> Store:
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    store = PrefixStore("exo", _get_default_store())
    store.set_timeout(_STORE_PATIENCE)
    return store


def _consequence(error: BaseException, rank: int, cause: str) -> str:
    what = " ".join(str(error).split())
    return f"rank {rank}: stopped because {cause} ({type(error).__name__}: {what[:160]})"


def _text(error: BaseException) -> str:
    """One line for errors that a user can act on, a traceback for others."""
    if isinstance(error, ExoError):
        return "exo-megatron: " + " ".join(str(error).splitlines())
    if isinstance(error, KeyboardInterrupt):
        return "exo-megatron: interrupted"
    return "".join(traceback.format_exception(error)).rstrip("\n")


def _write(text: str) -> None:
    """One write, so that lines of several ranks do not mix."""
    with suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
