"""Files that are either whole or absent, JSON and JSON lines."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import IO, Any, AnyStr, Literal

import psutil

from exo_megatron.errors import DataError

BYTE_ORDER_MARK = "\ufeff"

LONGEST_LINE = 64 * 2**20
"""Bytes of a line. A record of 64 candidates of 16,384 tokens with log-probs has about 40 MB."""

LARGEST_JSON = 2**30
"""Bytes of a file that is read as one JSON value."""


@contextmanager
def atomic_open(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only if the block ends without an exception.

    The content goes to a hidden file in the same directory, is flushed to the disk, and is renamed to
    `path`. Text is UTF-8 with `\\n` line ends. After an exception the old file, if any, is unchanged.
    The directory must exist: where an output has been taken away, writing must not make it again.
    """
    # Processes of several machines write into one directory, and in containers they have the same numbers.
    temporary = path.with_name(f".{path.name}.tmp-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}")
    encoding, newline = ("utf-8", "\n") if mode == "w" else (None, None)
    try:
        with open(temporary, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


_TEMPORARY = re.compile(r"\..+\.tmp-(?:(?P<machine>[0-9a-f]{8})-)?(?P<pid>\d+)-[0-9a-f]{8}")
TEMPORARY_FILES = ".*.tmp-*"
"""Pattern of the names of files that `atomic_open` writes."""

UNTOUCHED_SECONDS = 600.0
"""Seconds after which what another machine was writing, and has not written to since, counts as given up."""

_SAME_START = 5.0
"""Seconds by which two readings of a process's start may differ, as clocks are set."""


def is_abandoned(temporary: Path) -> bool:
    """Tell whether a file has a name that `atomic_open` gives, and the process that was writing it is gone."""
    match = _TEMPORARY.fullmatch(temporary.name)
    try:
        changed = temporary.stat().st_mtime
        if match is None or match["machine"] not in (None, _machine()):
            return match is not None and time.time() - changed > UNTOUCHED_SECONDS
        # A process that began after the last write has the number of the one that wrote.
        return psutil.Process(int(match["pid"])).create_time() > changed + _SAME_START
    except psutil.NoSuchProcess:
        return True
    except (OSError, psutil.Error):
        return False


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def fsync_directory(path: Path) -> None:
    """Make renames inside a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace the content of a text file atomically."""
    with atomic_open(path) as file:
        file.write(text)


def write_json(path: Path, value: object) -> None:
    """Write one JSON value atomically, indented. Raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read one JSON value. Raises DataError for a missing, unreadable or malformed file."""
    data = read_bounded(path)
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            str(path), f"is not JSON ({error})", expected="one JSON value in UTF-8", fix="restore or remake the file"
        ) from None


def write_jsonl(path: Path, records: Iterable[object]) -> None:
    """Write one JSON value per line atomically. Raises ValueError for NaN and infinities."""
    with atomic_open(path) as file:
        for record in records:
            file.write(json_line(record))


def json_line(record: object) -> str:
    """Write one record as a line of a JSON-lines file, with its line end.

    Raises ValueError for NaN and infinities.
    """
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Read the non-empty lines of a UTF-8 file one at a time, each with its number from 1.

    The text of a line has no line end. Lines end at a line feed only, so that the other separators
    of Unicode may stand inside JSON strings. Raises DataError for a missing or unreadable file, and
    with the line number for invalid UTF-8.
    """
    try:
        check_regular(path)
        with open(path, "rb") as file:
            for number, line in enumerate(bounded_lines(file, path), start=1):
                text = decode_line(line, f"{path}:{number}")
                text = (text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text).rstrip("\r\n")
                if text.strip():
                    yield number, text
    except OSError as error:
        raise _unreadable(path, error) from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the objects of a JSON-lines file, each with its line number.

    Raises DataError, which names the line, for a malformed one.
    """
    for number, line in read_lines(path):
        yield number, parse_json_object(line, f"{path}:{number}")


def parse_json_object(line: str, where: str) -> dict[str, Any]:
    """Parse one JSON object. Raises DataError at `where` for anything else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            where, f"is not JSON ({error})", expected="one JSON object per line", fix="correct or remove the line"
        ) from None
    if not isinstance(value, dict):
        raise DataError(
            where,
            f"is a JSON {type(value).__name__}",
            expected="one JSON object per line",
            fix="correct or remove the line",
        )
    return value


def sha256_file(path: Path, stop: Event | None = None) -> str:
    """Compute the SHA-256 of a file's content, in hexadecimal.

    Once `stop` is set, reading ends and the result covers only the part that was read.
    """
    digest = hashlib.sha256()
    view = memoryview(bytearray(2**20))
    with open(path, "rb", buffering=0) as file:
        while (size := file.readinto(view)) and not (stop is not None and stop.is_set()):
            digest.update(view[:size])
    return digest.hexdigest()


def check_regular(path: Path) -> None:
    """Raise DataError for a pipe, a device or a socket, which may have no end. Directories pass."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DataError(
            str(path),
            "is a pipe, a device or a socket",
            expected="a regular file",
            fix="copy what it holds into a file",
        )


def check_regular_files(directory: Path) -> None:
    """Raise DataError for a pipe, a device or a socket in a directory whose files a library will open."""
    for path in sorted(directory.iterdir()):
        if path.exists():  # a link may lead nowhere
            check_regular(path)


def bounded_lines(file: IO[AnyStr], path: Path) -> Iterator[AnyStr]:
    """Read the lines of a file with their ends. Raises DataError at one that is longer than LONGEST_LINE."""
    for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), file.read(0)), start=1):
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{path}:{number}",
                f"has more than {LONGEST_LINE:,} bytes",
                expected="lines of one record each, of at most so many bytes",
                fix="write each record on a line of its own, or correct or remove the record",
            )
        yield line


def decode_line(line: bytes, where: str) -> str:
    """Decode a line of UTF-8. Raises DataError at `where` for other bytes."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            where,
            f"byte {error.start + 1} of the line (0x{line[error.start]:02x}) is not UTF-8",
            expected="UTF-8 text",
            fix="convert the file to UTF-8, for example with iconv",
        ) from None


def read_bounded(path: Path, largest: int = LARGEST_JSON) -> bytes:
    """Read a regular file of at most `largest` bytes. Raises DataError for another one."""
    try:
        check_regular(path)
        size = path.stat().st_size
        if size <= largest:
            return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None
    raise DataError(
        str(path), f"has {size:,} bytes", expected=f"at most {largest:,}", fix="restore the file, or give another one"
    )


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        str(path),
        f"cannot be read ({error.strerror})",
        expected="a readable file",
        fix="check the path and its permissions",
    )
