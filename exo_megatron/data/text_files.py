"""Rows of text files: JSON lines, JSON arrays and separated values, compressed or not."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any

from exo_megatron.data.entries import SourceEntry
from exo_megatron.errors import DataError, reason
from exo_megatron.utils.files import (
    BYTE_ORDER_MARK,
    LONGEST_LINE,
    bounded_lines,
    check_regular,
    decode_line,
    parse_json_object,
)

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Compressions of text files by the end of the name."""

BEGINNING = 4096
"""Bytes that tell what a file is."""

LARGEST_ARRAY = 512 * 2**20
"""Bytes of a file that is one JSON array, once decompressed. It is in memory as a whole."""

WRAPPERS = ("data", "train", "rows", "records", "examples", "instances")
"""Keys under which JSON files with one object hold their records."""


def read_json_text(path: Path) -> Iterator[SourceEntry]:
    """Read JSON lines, or the objects of one JSON array. Raises DataError for a malformed file."""
    if _first_character(path) == "[":
        yield from _read_array(path)
        return
    lines = _raw_lines(path)
    first = next(lines, None)
    if first is None:
        return
    second = next(lines, None)
    _refuse_one_object(path, _tentative(first[1]), alone=second is None)
    for number, line in chain([first], [] if second is None else [second], lines):
        yield SourceEntry(f"{path}:{number}", f"line-{number}", partial(_parse_line, path, number, line))


def _parse_line(path: Path, number: int, line: bytes) -> Mapping[str, Any]:
    return parse_json_object(_text(path, number, line), f"{path}:{number}")


def _read_array(path: Path) -> Iterator[SourceEntry]:
    lines = _whole(path, LARGEST_ARRAY).split(b"\n")
    text = "\n".join(_text(path, number, line) for number, line in enumerate(lines, start=1))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            str(path),
            f"begins with '[', but is not a JSON array ({error})",
            expected="one JSON array of objects, or one JSON object per line",
            fix="restore or remake the file",
        ) from None
    for number, value in enumerate(values, start=1):
        where = f"{path} item {number}"
        yield SourceEntry(where, f"item-{number}", partial(_object, value, where))


def _object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            where, f"is a JSON {type(value).__name__}", expected="an array of objects", fix="correct or remove it"
        )
    return value


def _refuse_one_object(path: Path, first: str, *, alone: bool) -> None:
    """Raise DataError for a file that is one object around its records, or one over several lines."""
    try:
        whole, over_lines = json.loads(first), False
    except (ValueError, RecursionError):
        if alone:
            return
        try:
            whole, over_lines = json.loads(_tentative(_whole(path, LONGEST_LINE))), True
        except (ValueError, RecursionError, DataError):
            return
    if not isinstance(whole, dict) or not (alone or over_lines):
        return
    key = next((key for key in WRAPPERS if isinstance(whole.get(key), list | dict)), None)
    if key is not None or over_lines:
        raise DataError(
            str(path),
            "is one JSON object" + (f", which holds its records under {key!r}" if key else " over several lines"),
            expected="a JSON array of objects, or one JSON object per line",
            fix=f"write the value of {key!r} alone into the file" if key else "write each record on one line",
        )


def read_separated(path: Path) -> Iterator[SourceEntry]:
    """Read comma- or tab-separated values, whose first line has the names of the columns.

    All values are strings, as they stand there. Raises DataError for a malformed file.
    """
    csv.field_size_limit(LONGEST_LINE)  # of a cell, in all readers; texts may be longer than the 131,072 by default
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    number = 0
    try:
        with _decompressed(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(bounded_lines(text, path), delimiter=delimiter, strict=True)
            header = next(reader, [])
            if len(set(header)) < len(header):
                twice = sorted({name for name in header if header.count(name) > 1})
                raise DataError(
                    f"{path}:1", f"names {twice[0]!r} twice", expected="different names of columns", fix="rename one"
                )
            number = reader.line_num
            for row in reader:
                start, number = number + 1, reader.line_num
                if not row:
                    continue
                where = f"{path}:{start}"
                yield SourceEntry(where, f"line-{start}", partial(_columns, header, row, where))
    except csv.Error as error:
        raise DataError(
            f"{path}:{number + 1}",
            f"cannot be read as values between {delimiter!r} ({error})",
            expected="a CSV or TSV file, with quotes in pairs",
            fix="correct the file",
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            str(path),
            f"is not UTF-8 after line {number} ({error.reason})",
            expected="UTF-8 text",
            fix="convert the file",
        ) from None


def _columns(header: Sequence[str], row: Sequence[str], where: str) -> Mapping[str, Any]:
    if len(row) != len(header):
        raise DataError(
            where,
            f"has {len(row)} values for {len(header)} columns",
            expected="a value for each column of the first line, with quotes where it has a delimiter",
            fix="correct the line",
        )
    return dict(zip(header, row, strict=True))


def _first_character(path: Path) -> str:
    """Return the first character of a file that is no space, as far as its beginning shows one."""
    with _decompressed(path) as file:
        return _tentative(file.read(BEGINNING)).lstrip()[:1]


def _whole(path: Path, largest: int) -> bytes:
    """Read a whole file, decompressed. Raises DataError if that has more than `largest` bytes."""
    with _decompressed(path) as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise DataError(
            str(path),
            f"is one JSON value of more than {largest:,} bytes",
            expected="one JSON object per line, which are read one after another",
            fix="write the records as JSON lines",
        )
    return data


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Read the non-empty lines of a text file, compressed or not, each with its number from 1."""
    with _decompressed(path) as file:
        for number, line in enumerate(bounded_lines(file, path), start=1):
            if not line.isspace():
                yield number, line


def _text(path: Path, number: int, line: bytes) -> str:
    """Return a line without its end, and the first without a byte order mark. Raises DataError for invalid UTF-8."""
    text = decode_line(line, f"{path}:{number}").rstrip("\r\n")
    return text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text


def _tentative(line: bytes) -> str:
    """Decode a line to see what the file is. Bytes that are not UTF-8 are an error only where the line is parsed."""
    return line.decode("utf-8", errors="replace").removeprefix(BYTE_ORDER_MARK)


@contextmanager
def _decompressed(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to read what it holds.

    Raises DataError if it is not there, or what is read of it in the block is damaged.
    """
    compression = COMPRESSIONS.get(path.suffix)
    try:
        check_regular(path)
        if compression == "gzip":
            with gzip.open(path, "rb") as unpacked:
                yield io.BufferedReader(unpacked)
        elif compression == "zstd":
            import pyarrow  # which `datasets` needs; it has a decompressor that notices a missing end

            with pyarrow.input_stream(str(path), compression="zstd") as stream, io.BufferedReader(stream) as file:
                yield file
        else:
            with open(path, "rb") as file:
                yield file
    except (OSError, EOFError, zlib.error) as error:
        what = "cannot be read" if compression is None else "cannot be decompressed"
        raise DataError(
            str(path),
            f"{what} ({reason(error)})",
            expected=f"a complete {compression} file" if compression else "a readable file",
            fix="restore the file",
        ) from None


READERS: Mapping[str, Callable[[Path], Iterator[SourceEntry]]] = {"json": read_json_text, "csv": read_separated}
"""Readers by the kind of file."""
