"""The end of a process that fails: what is written about it, by which rank, and the exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn

from exo_megatron.errors import ConfigError, ExoError

if TYPE_CHECKING:
    from exo_megatron.parallel.watch.start import Watch

FAILURE = 1
INTERRUPTED = 130


def exit_code(error: BaseException) -> int:
    """Return the exit code of the process that ends with this error."""
    if isinstance(error, ExoError):
        return error.exit_code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILURE


def report(error: BaseException) -> int:
    """Tell the user about an error outside a process group, and return the exit code.

    All ranks read the same configuration, so only rank 0 reports a ConfigError.
    """
    if not (isinstance(error, ConfigError) and environment_rank(os.environ) != 0):
        _write(_text(error))
    return exit_code(error)


def leave_mpi(code: int) -> None:
    """End the process if MPI is initialised: MPI_Finalize waits for ranks that may never come."""
    if "mpi4py.MPI" in sys.modules:
        _exit_now(code)


def environment_rank(env: Mapping[str, str]) -> int:
    """Return this process's rank, set in the environment by its launcher; 0 without one."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
    return next((int(env[name]) for name in names if env.get(name, "").isdigit()), 0)


@contextmanager
def leaving_together(rank: int, watch: Watch) -> Iterator[None]:
    """End this process at once if the block fails while other ranks may be waiting for it.

    Destroying the process group could wait for them without end, so the process exits without it;
    launchers then stop the other ranks. A message that several ranks have in the same words is
    printed once, and ranks that fail only because a peer was lost or failed say so in one line and exit with
    the peer's code.
    """
    try:
        yield
    except BaseException as error:
        _leave(error, rank, watch)


def _leave(error: BaseException, rank: int, watch: Watch) -> NoReturn:
    text = _text(error)
    crashed = not isinstance(error, ExoError | KeyboardInterrupt)
    if crashed:
        text = f"rank {rank}: {text}"
    code, text = watch.depart(exit_code(error), text, crashed=crashed)
    if text:
        _write(text)
    watch.linger()
    _exit_now(code)


def _exit_now(code: int) -> NoReturn:
    """Exit without the interpreter's clean-up, which may wait for peers."""
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _text(error: BaseException) -> str:
    """Format one line for errors that a user can act on, a traceback for others."""
    if isinstance(error, ExoError):
        return "exo-megatron: " + " ".join(str(error).splitlines())
    if isinstance(error, KeyboardInterrupt):
        return "exo-megatron: interrupted"
    return "".join(traceback.format_exception(error)).rstrip("\n")


def _write(text: str) -> None:
    """Write in one call, so that lines of several ranks do not mix."""
    with suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
