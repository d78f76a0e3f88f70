"""The entries of a data source, read one after another, and the records that they become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

from exo_megatron.data.records import SourceRecord, unicode_text
from exo_megatron.errors import DataError


class SourceEntry(NamedTuple):
    """One record of a source, which nobody has parsed yet.

    Attributes:
        where: file and line, or data set and row, for messages.
        place: a name for it that does not change between runs.
        parse: returns its fields. Raises DataError for a malformed one.
    """

    where: str
    place: str
    parse: Callable[[], Mapping[str, Any]]


Entries = Callable[[], Iterator[SourceEntry]]
"""Function that reads entries from the first on; none of them is parsed yet."""


@dataclass(frozen=True)
class Source:
    """The entries of a data source, which are read as they are iterated over.

    Attributes:
        name: path or name, as the user gave it.
        format: its kind in words, such as "JSON lines" or "3 parquet files".
        entries: the entries of the wanted split or slice.
        files: all files that they are read from, in order.
    """

    name: str
    format: str
    entries: Entries
    files: tuple[Path, ...]

    def read(self, limit: int | None = None) -> list[SourceRecord]:
        """Read all records, or the first `limit`.

        Raises DataError for entries that cannot be read, a repeated id, and no record at all.
        """
        records: list[SourceRecord] = []
        places: dict[str, str] = {}
        for entry in islice(self.entries(), limit):
            record = read_record(entry)
            note_id(places, record.id, record.where)
            records.append(record)
        if not records:
            raise no_record(self.name)
        return records

    def shares(
        self, size: int, wanted: Callable[[int], bool], limit: int | None = None
    ) -> Iterator[tuple[int, list[SourceEntry]]]:
        """Yield consecutive shares of `size` entries with their numbers from 0; the last may be smaller.

        Shares that are not `wanted` are passed over, without entries. At most `limit` entries are read.
        """
        entries = islice(self.entries(), limit)
        for number in count():
            if wanted(number):
                share = list(islice(entries, size))
                found = len(share)
            else:
                share, found = [], sum(1 for _ in islice(entries, size))
            if not found:
                return
            yield number, share


def read_record(entry: SourceEntry) -> SourceRecord:
    """Parse an entry. A record without an id gets its place as the id. Raises DataError."""
    fields = {name: value for name, value in entry.parse().items() if value is not None}
    return SourceRecord(entry.where, _identifier(entry.where, fields.get("id"), entry.place), fields)


def note_id(places: dict[str, str], id: str, where: str) -> None:
    """Note the place of a record by its id. Raises DataError for an id that another one had before."""
    if id in places:
        raise DataError(where, f"repeats id {id!r} of {places[id]}", expected="unique ids", fix="rename one")
    places[id] = where


def no_record(source: str) -> DataError:
    """Make the error for a source without records."""
    return DataError(source, "holds no record", expected="at least one record", fix="check data.path")


def source_changed(where: str) -> DataError:
    """Make the error for a source that somebody writes to while it is read."""
    return DataError(
        where,
        "changed while it was read",
        expected="files that nobody writes to, the same for every process",
        fix="start again when the data are complete",
    )


def _identifier(where: str, value: object, place: str) -> str:
    if value is None:
        return place
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(where, f"'id' is {value!r}", expected="a non-empty string or an integer", fix="correct the id")
    return unicode_text(where, "id", str(value))
