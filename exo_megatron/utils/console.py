"""Standard output and error that last as long as the work, whoever stops reading them."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class _PatientFile(io.FileIO):
    """A file that drops what it cannot write: nobody reads the pipe any more, or the disk of the log is full."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let no failed write to standard output or error end a block, those of libraries and of user's code included.

    Streams that stand for no file, such as those of a test, stay as they are.
    """
    former = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_patient, former)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = former


def _patient(stream: TextIO) -> TextIO:
    with suppress(OSError):
        stream.flush()
    try:
        number = stream.fileno()
    except (OSError, ValueError, AttributeError):
        return stream
    file = io.BufferedWriter(_PatientFile(number, "wb", closefd=False))
    return io.TextIOWrapper(file, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
