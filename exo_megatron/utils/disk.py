"""Free space on the disk, and the one line about a file that could not be written."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exo_megatron.errors import StorageError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_failure(path: Path, error: OSError, *, needed: int | None) -> StorageError:
    """Make the error that tells the user about an OSError while writing below `path`.

    needed: bytes of the whole output; None if that is not known.
    """
    free = free_bytes(path)
    if error.errno in _NO_SPACE:
        wanted = "more" if needed is None else f"{needed:,} bytes"
        return StorageError(
            str(path),
            f"could not be written: {error.strerror}, {free:,} bytes are free",
            expected=f"room for {wanted}",
            fix="free space on this file system (or raise the quota or file size limit) and run again",
        )
    if error.errno == errno.ENOENT:
        return vanished(path)
    return StorageError(
        str(path),
        f"could not be written ({error.strerror or error})",
        expected="a directory that can be written",
        fix="check the path, its permissions and the file system",
    )


def vanished(path: Path) -> StorageError:
    """Make the error for a file or directory of the output that is no longer where it was made."""
    return StorageError(
        str(path),
        "is gone: removed, moved or unmounted while the run was writing there",
        expected="an output that nobody else touches",
        fix="put it back where it was, and run again; what was finished is in it",
    )


@contextmanager
def reporting(path: Path, *, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError of a block that writes `path`, or below it, into a StorageError."""
    try:
        yield
    except OSError as error:
        raise write_failure(path, error, needed=needed) from None


@contextmanager
def reporting_all(output: Path) -> Iterator[None]:
    """Turn every OSError of a stage that tells of a full disk, or of a file below `output`, into a StorageError.

    Libraries write, too: where no reader or writer of ours has told about a failure, this does.
    """
    try:
        yield
    except OSError as error:
        named = Path(error.filename) if isinstance(error.filename, str) else None
        ours = named is not None and output.absolute() in named.absolute().parents
        if error.errno not in _NO_SPACE and not ours:
            raise
        raise write_failure(output if named is None else named, error, needed=None) from error


def check_space(path: Path, needed: int) -> None:
    """Raise StorageError if the file system of `path` has less than `needed` bytes left."""
    free = free_bytes(path)
    if free < needed:
        raise StorageError(
            str(path),
            f"needs {needed:,} bytes but {free:,} are free on its file system",
            expected="enough room for the whole output",
            fix="free space or choose another directory, and run again",
        )


def free_bytes(path: Path) -> int:
    """Return the bytes free on the file system where `path` is or would be made."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
