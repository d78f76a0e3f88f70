"""Where records come from: JSON lines (also gzipped), `datasets` on disk or on the hub, directories of stages."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from exo_megatron.data.reasons import reason
from exo_megatron.errors import DataError
from exo_megatron.utils.files import parse_json_object, read_jsonl

JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


@dataclass(frozen=True)
class SourceRecord:
    """One record as it was read.

    where: file and line, or data set and row, for messages. id: the record's own "id", or its stable place.
    fields: its values without nulls, which columnar data sets use for what is absent.
    """

    where: str
    id: str
    fields: Mapping[str, Any]


def read_records(source: str, *, split: str, limit: int | None) -> list[SourceRecord]:
    """Read all records (the first `limit`) of a data source.

    source: a JSON-lines file, a parquet file, a directory with candidates.jsonl, a directory made by
    `Dataset.save_to_disk` or holding parquet or JSON files, or the name of a data set on the hub. split: where
    the source is a `datasets` data set. Raises DataError for what cannot be read, is empty, or repeats an id.
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
    """Read a JSON-lines file; see `read_records`. A record without an id is called by its line number."""
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
    """Whether the user meant a file or directory: a hub name is `name` or `owner/name` without such marks."""
    return (
        source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or source.endswith((*JSON_LINES, ".gz", ".parquet", ".txt", ".csv"))
    )


def _dataset_rows(source: str, path: Path, split: str) -> Iterable[Mapping[str, Any]]:
    """Open a `datasets` data set and pick the split."""
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
