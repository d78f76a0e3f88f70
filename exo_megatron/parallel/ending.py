"""The end of a run: after a failure no rank is left waiting; on a stop request it saves first."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TypeVar

from exo_megatron.errors import CheckpointError, ConfigError, ExoError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from exo_megatron.parallel.runtime import Runtime

T = TypeVar("T")

FAILURE = 1
INTERRUPTED = 130
_STORE_PATIENCE = timedelta(seconds=5)
LINGER_SECONDS = 5.0
"""Seconds that rank 0 waits for the other ranks to fail.

It often hosts the store through which ranks learn of each other's failure. A rank that fails later
than this tells its error again, or tells that rank 0 is gone.
"""


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
def leaving_together(runtime: Runtime) -> Iterator[None]:
    """End this process at once if the block fails while other ranks may be waiting for it.

    Destroying the process group could wait for them without end, so the process exits without it;
    launchers then stop the other ranks. A message that several ranks have in the same words is
    printed once, and ranks that fail only because a peer left say so in one line and exit with the
    peer's code. A lone process passes the exception on.
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
        # The store is gone with rank 0, which most likely is also the cause of this rank's failure.
        _write(_text(error) if isinstance(error, ExoError) else _consequence(error, runtime.rank, "rank 0 is gone"))
    _exit_now(code)


def _exit_now(code: int) -> NoReturn:
    """Exit without the interpreter's clean-up, which may wait for peers."""
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _tell(error: BaseException, runtime: Runtime, store: Store) -> int:
    """Write what no other rank has written yet, and return the exit code."""
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
    end = time.monotonic() + LINGER_SECONDS
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


@contextmanager
def failing_together() -> Iterator[None]:
    """Run the block on this rank and wait for the others at its end. Collective over the world.

    If any rank's block raised, every rank raises: the first failing rank its own exception, the
    others a CheckpointError of the same words, which is then printed once. A failure that is not an
    ExoError keeps its traceback.
    """
    import torch.distributed as dist

    from exo_megatron.parallel.runtime import share_object

    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    described = share_object(None if failure is None else _describe(failure))
    first = next((rank for rank, fields in enumerate(described) if fields is not None), None)
    if first is None:
        return
    if failure is not None and (first == dist.get_rank() or not isinstance(failure, ExoError)):
        raise failure
    where, problem, expected, fix = described[first] or ("", "", "", "")
    raise CheckpointError(where, problem, expected=expected, fix=fix)


def on_main(runtime: Runtime, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result, pickled, on every rank.

    Collective over the world. If it raised, every rank raises: an ExoError itself; for other
    failures rank 0 raises its own, the others a CheckpointError of the same words.
    """
    result: T | None = None
    failure: ExoError | None = None
    original: Exception | None = None
    if runtime.is_main:
        try:
            result = work()
        except ExoError as error:
            failure = error
        except Exception as error:
            original = error
            where, problem, expected, fix = _describe(error)
            failure = CheckpointError(where, problem, expected=expected, fix=fix)
    result, failure = runtime.broadcast_object((result, failure))
    if original is not None:
        raise original
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def _describe(error: Exception) -> tuple[str, str, str, str]:
    if isinstance(error, ExoError):
        return error.where, error.problem, error.expected, error.fix
    return "checkpoint", f"{type(error).__name__}: {error}", "all ranks to do their part", "see the failing rank's log"


STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
SAME_KEY_PRESS = 2.0
"""Seconds within which a second SIGINT counts as the same Ctrl-C.

torchrun passes on the Ctrl-C that its processes have already received from the terminal.
"""


class StopRequest:
    """A flag that is true once a stop signal has arrived in this process.

    `received`: number of the signal.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._interrupted: float | None = None

    def __bool__(self) -> bool:
        return self.received is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Record the signal. A second Ctrl-C ends the process at once, as without a handler.

        The first one only asks to stop, also after another signal has asked for it.
        """
        if self.received is None:
            self.received = number
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
        elif now - self._interrupted > SAME_KEY_PRESS:
            _leave_by(signal.SIGINT)


def _leave_by(number: int) -> None:
    """End this process by a signal, as without a handler."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Record SIGUSR2, SIGTERM and SIGINT in a block instead of ending the process."""
    request = StopRequest()
    former = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
