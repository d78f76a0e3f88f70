"""Failing together: an error on one rank is an error on every rank, instead of a wait for it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from exo_megatron.errors import CheckpointError, ExoError

T = TypeVar("T")

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def together(work: Callable[[], T]) -> T:
    """Run `work` on this rank and wait for the others. Collective over the world.

    If any rank's work raised, every rank raises: the first failing rank its own exception, the others a
    CheckpointError of the same words, which are then told once. A failure that is not an ExoError keeps its traceback.
    """
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    described: list[tuple[str, str, str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(described, None if failure is None else _describe(failure))
    first = next((rank for rank, fields in enumerate(described) if fields is not None), None)
    if first is None:
        return result
    if failure is not None and (first == dist.get_rank() or not isinstance(failure, ExoError)):
        raise failure
    where, problem, expected, fix = described[first] or ("", "", "", "")
    raise CheckpointError(where, problem, expected=expected, fix=fix)


def on_main(work: Callable[[], None]) -> None:
    """Run `work` on rank 0 only; a failure there is raised on every rank. Collective over the world."""
    together(work if dist.get_rank() == 0 else lambda: None)


def write_failure(path: Path, error: OSError, *, needed: int | None) -> CheckpointError:
    """What to tell the user about an OSError while writing below `path`. needed: bytes of the whole output."""
    free = free_bytes(path)
    if error.errno in _NO_SPACE:
        wanted = "more" if needed is None else f"{needed:,} bytes"
        return CheckpointError(
            str(path),
            f"could not be written: {error.strerror}, {free:,} bytes are free",
            expected=f"room for {wanted}",
            fix="free space on this file system (or raise the quota or file size limit) and run again",
        )
    return CheckpointError(
        str(path),
        f"could not be written ({error.strerror or error})",
        expected="a directory that can be written",
        fix="check the path, its permissions and the file system",
    )


def check_space(path: Path, needed: int) -> None:
    """Raise CheckpointError if the file system of `path` has less than `needed` bytes left."""
    free = free_bytes(path)
    if free < needed:
        raise CheckpointError(
            str(path),
            f"needs {needed:,} bytes but {free:,} are free on its file system",
            expected="enough room for the whole output",
            fix="free space or choose another directory, and run again",
        )


def free_bytes(path: Path) -> int:
    """Bytes free on the file system where `path` is or would be made."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _describe(error: Exception) -> tuple[str, str, str, str]:
    if isinstance(error, ExoError):
        return error.where, error.problem, error.expected, error.fix
    return "checkpoint", f"{type(error).__name__}: {error}", "all ranks to do their part", "see the failing rank's log"
