"""Records and their fields, from JSON lines (also gzipped), `datasets`, or a stage's output."""

from __future__ import annotations

import difflib
import gzip
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from exo_megatron.errors import DataError, reason
from exo_megatron.utils.files import parse_json_object, read_jsonl

JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


@dataclass(frozen=True)
class SourceRecord:
    """One record as it was read.

    Attributes:
        where: file and line, or data set and row, for messages.
        id: the record's own "id", or its place, which does not change between runs.
        fields: its values without nulls, which columnar data sets use for absent values.
    """

    where: str
    id: str
    fields: Mapping[str, Any]


def read_records(source: str, *, split: str, limit: int | None) -> list[SourceRecord]:
    """Read all records of a data source, or the first `limit`.

    `source` is a JSON-lines file, a parquet file, a directory with candidates.jsonl, a directory
    that `Dataset.save_to_disk` made or that holds parquet or JSON files, or the name of a data set
    on the hub. `split` is used if the source is a `datasets` data set. Raises DataError for a
    source that cannot be read, is empty, or repeats an id.
    """
    path = Path(source).expanduser()
    if path.is_dir() and (path / "candidates.jsonl").is_file():
        return read_jsonl_records(path / "candidates.jsonl", limit=limit)
    if path.is_file() and path.name.endswith(JSON_LINES):
        return read_jsonl_records(path, limit=limit)
    if not path.exists() and _means_a_path(source):
        raise DataError(
            source, "does not exist", expected="a file, a directory or the name of a data set", fix="correct data.path"
        )
    rows = _dataset_rows(source, path, split)
    return _collect(source, ((f"{source}[{split}] row {n}", f"row-{n}", row) for n, row in enumerate(rows)), limit)


def read_jsonl_records(path: Path, *, limit: int | None = None) -> list[SourceRecord]:
    """Read a JSON-lines file, as `read_records` does.

    A record without an id gets its line number as the id.
    """
    lines = _gzip_jsonl(path) if path.suffix == ".gz" else read_jsonl(path)
    return _collect(str(path), ((f"{path}:{n}", f"line-{n}", fields) for n, fields in lines), limit)


def _collect(source: str, rows: Iterable[tuple[str, str, Mapping[str, Any]]], limit: int | None) -> list[SourceRecord]:
    records: list[SourceRecord] = []
    places: dict[str, str] = {}
    for where, place, row in islice(rows, limit):
        fields = {name: value for name, value in row.items() if value is not None}
        record = SourceRecord(where, _identifier(where, fields.get("id"), place), fields)
        if record.id in places:
            raise DataError(
                where, f"repeats id {record.id!r} of {places[record.id]}", expected="unique ids", fix="rename one"
            )
        places[record.id] = where
        records.append(record)
    if not records:
        raise DataError(source, "holds no record", expected="at least one record", fix="check data.path")
    return records


def _identifier(where: str, value: object, place: str) -> str:
    if value is None:
        return place
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(where, f"'id' is {value!r}", expected="a non-empty string or an integer", fix="correct the id")
    return str(value)


def _gzip_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with gzip.open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, parse_json_object(_utf8(line, f"{path}:{number}"), f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            str(path),
            f"cannot be decompressed ({reason(error)})",
            expected="a complete gzip file",
            fix="restore the file",
        ) from None


def _utf8(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            where, f"byte {error.start + 1} of the line is not UTF-8", expected="UTF-8 text", fix="convert the file"
        ) from None


def _means_a_path(source: str) -> bool:
    """Tell whether the user meant a file or directory, not a hub name (`name` or `owner/name`)."""
    return (
        source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or source.endswith((*JSON_LINES, ".gz", ".parquet", ".txt", ".csv"))
    )


def _dataset_rows(source: str, path: Path, split: str) -> Iterable[Mapping[str, Any]]:
    """Open a `datasets` data set and return its split.

    Raises DataError if the data set cannot be opened or has no such split.
    """
    import datasets

    try:
        if path.is_file():
            opened = _load_file(datasets, path, split)
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            opened = datasets.load_from_disk(str(path))
        else:
            opened = datasets.load_dataset(source if not path.exists() else str(path), split=split)
    # `datasets` raises dozens of unrelated types for a source that it cannot read.
    except Exception as error:
        raise DataError(
            source,
            f"cannot be opened as a data set with split {split!r} ({reason(error)})",
            expected=f"a local file ({', '.join(JSON_LINES)}, .parquet), a directory, or a data set's name",
            fix="check data.path and data.split",
        ) from None
    if isinstance(opened, dict):
        if split not in opened:
            raise DataError(
                source,
                f"has no split {split!r}",
                expected=f"one of {', '.join(sorted(opened))}",
                fix="set data.split",
            )
        opened = opened[split]
    rows: Iterable[Mapping[str, Any]] = opened
    return rows


def _load_file(datasets: Any, path: Path, split: str) -> Any:
    if path.suffix != ".parquet":
        raise ValueError(f"unknown kind of file {path.name!r}")
    return datasets.load_dataset("parquet", data_files={split: str(path)}, split=split)


Fields = Mapping[str, Any]


def require(where: str, fields: Fields, name: str) -> Any:
    """Return the value of a field.

    Raises DataError, which suggests fields with similar names, if it is missing.
    """
    if name in fields:
        return fields[name]
    near = difflib.get_close_matches(name, list(fields), n=2, cutoff=0.5)
    present = ", ".join(sorted(fields)) or "none"
    raise DataError(
        where,
        f"has no field {name!r} (fields: {present})",
        expected=f"a field {name!r}",
        fix=f"rename {' or '.join(map(repr, near))} to {name!r}" if near else f"add {name!r}",
    )


def text(where: str, fields: Fields, name: str) -> str:
    """Return a string field. Raises DataError for another value."""
    value = require(where, fields, name)
    if not isinstance(value, str):
        raise wrong_type(where, name, value, "a string")
    return unicode_text(where, name, value)


def boolean(where: str, fields: Fields, name: str) -> bool:
    """Return a true/false field. Raises DataError for another value."""
    value = require(where, fields, name)
    if not isinstance(value, bool):
        raise wrong_type(where, name, value, "true or false")
    return value


def finite_number(where: str, fields: Fields, name: str) -> float:
    """Return a number that is neither NaN nor infinite. Raises DataError for another value."""
    return _finite(where, name, require(where, fields, name))


def finite_numbers(where: str, fields: Fields, name: str) -> tuple[float, ...]:
    """Return a list of finite numbers. Raises DataError for another value."""
    values = list_field(where, fields, name, "a list of numbers")
    return tuple(_finite(where, f"{name}[{k}]", value) for k, value in enumerate(values))


def finite_number_lists(where: str, fields: Fields, name: str) -> tuple[tuple[float, ...], ...]:
    """Return a list of lists of finite numbers. Raises DataError for another value."""
    lists = dict(enumerate(list_field(where, fields, name, "a list of lists of numbers")))
    return tuple(finite_numbers(f"{where} {name}", {str(k): values}, str(k)) for k, values in lists.items())


def token_ids(where: str, fields: Fields, name: str) -> tuple[int, ...]:
    """Return a non-empty list of token ids >= 0. Raises DataError for another value."""
    values = list_field(where, fields, name, "a list of token ids")
    if not values or not all(type(value) is int and value >= 0 for value in values):
        raise wrong_type(where, name, values, "a non-empty list of token ids >= 0")
    return tuple(values)


def object_list(where: str, fields: Fields, name: str) -> list[Fields]:
    """Return a non-empty list of JSON objects. Raises DataError for another value."""
    values = list_field(where, fields, name, "a list of objects")
    if not values or not all(isinstance(value, Mapping) for value in values):
        raise wrong_type(where, name, values, "a non-empty list of objects")
    return list(values)


def wrong_type(where: str, name: str, value: object, expected: str) -> DataError:
    """Make the error for a value of the wrong kind, which is shown shortened."""
    shown = repr(value)
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return DataError(where, f"{name!r} is {shown}", expected=expected, fix="correct the record")


def unicode_text(where: str, name: str, value: str) -> str:
    """Return the text. Raises DataError if it holds half of a surrogate pair.

    JSON can write that, but no tokenizer can read it.
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            where,
            f"{name!r} has an unpaired surrogate ({error.object[error.start]!a}) at character {error.start}",
            expected="Unicode text",
            fix="correct the record: a character above U+FFFF was cut in two",
        ) from None
    return value


def list_field(where: str, fields: Fields, name: str, expected: str) -> list[Any]:
    """Return a list. Raises DataError for another value; `expected` says what it should be."""
    value = require(where, fields, name)
    if not isinstance(value, list):
        raise wrong_type(where, name, value, expected)
    return value


def _finite(where: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(where, name, value, "a finite number")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the range of float
        number = math.inf
    if not math.isfinite(number):
        raise wrong_type(where, name, value, "a finite number")
    return number
