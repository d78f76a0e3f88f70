"""Free space on the disk, and the error for an output that could not be written."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from exo_megatron.errors import CheckpointError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_failure(path: Path, error: OSError, *, needed: int | None) -> CheckpointError:
    """Make the error that tells the user about an OSError while writing below `path`.

    needed: bytes of the whole output.
    """
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
    """Return the bytes free on the file system where `path` is or would be made."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
