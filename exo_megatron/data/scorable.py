"""The input of `score`, read in shares: shards one by one, any other data source so many records at a time."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from exo_megatron.data import shards
from exo_megatron.data.completions import ScorableRecord, column_names, parse_scorable
from exo_megatron.data.entries import Source, no_record, read_record, repeated_id
from exo_megatron.data.reading import read_layouts
from exo_megatron.data.records import SourceRecord
from exo_megatron.data.sources import open_source
from exo_megatron.errors import DataError

Wanted = Callable[[int], bool]
"""Function that tells whether the share with this number is wanted."""


@dataclass(frozen=True)
class Share:
    """Consecutive records of the input.

    Attributes:
        number: its place among the shares, from 0.
        records: checked and in their types.
        places: where they stand, for messages.
        digest: SHA-256 of what was read.
        description: a line that says what the records were taken for.
    """

    number: int
    records: list[ScorableRecord]
    places: list[str]
    digest: str
    description: str


def read_shares(path: Path, wanted: Wanted) -> Iterator[Share]:
    """Read the wanted shares in order; what is in memory at a time is one of them.

    Args:
        path: the output of `rollout`, a file of its records, or any data source whose layout has
            several completions. Shares of shards are these; others have RECORDS_PER_SHARD records.
        wanted: tells which shares this process wants.

    Raises:
        DataError: it does not exist, or a wanted record or shard, which is named, is of no use. Ids
            that are repeated in another share are not noticed.
    """
    if not path.exists():
        raise DataError(
            str(path), "does not exist", expected="output of `rollout`, or a file", fix="correct candidates"
        )
    found = shards.find_shards(path)
    return _read_source(str(path), wanted) if found is None else _read_shards(found, wanted)


@dataclass(frozen=True)
class Survey:
    """Notes on a share whose records are no longer in memory.

    Attributes:
        number, digest, description: of the share.
        places: ids of its records, and where they stand.
        names: of the columns that its records have.
        completions: number of candidates of all its records.
    """

    number: int
    digest: str
    description: str
    places: Sequence[tuple[str, str]]
    names: Sequence[str]
    completions: int


@dataclass(frozen=True)
class Contents:
    """The input as a whole.

    Attributes:
        digest: of all shares, in order.
        names: of the columns that any record has, in order of appearance.
        completions: number of candidates of each share.
        descriptions: a line for every kind of share.
    """

    digest: str
    names: Sequence[str]
    completions: Sequence[int]
    descriptions: Sequence[str]


def survey(share: Share) -> Survey:
    """Note what is needed of a share after its records."""
    return Survey(
        share.number,
        share.digest,
        share.description,
        [(record.id, where) for record, where in zip(share.records, share.places, strict=True)],
        column_names(share.records),
        sum(len(record.texts) for record in share.records),
    )


def join_surveys(surveys: Iterable[Survey]) -> Contents:
    """Put the surveys of all shares together, which may come in any order.

    Raises DataError for an id that two records have.
    """
    ordered = sorted(surveys, key=lambda each: each.number)
    places: dict[str, str] = {}
    for id, where in chain.from_iterable(each.places for each in ordered):
        if id in places:
            raise repeated_id(id, where, places[id])
        places[id] = where
    return Contents(
        hashlib.sha256("".join(each.digest for each in ordered).encode()).hexdigest(),
        list(dict.fromkeys(chain.from_iterable(each.names for each in ordered))),
        [each.completions for each in ordered],
        _describe([each.description for each in ordered]),
    )


def _describe(descriptions: Sequence[str]) -> list[str]:
    """Return the first description of each kind: those that differ in numbers only are of one kind."""
    kinds: dict[str, list[str]] = {}
    for each in descriptions:
        kinds.setdefault(re.sub(r"\d+", "", each).replace(" records", " record"), []).append(each)
    return [kind[0] + (f"; {len(kind) - 1} more shards like it" if len(kind) > 1 else "") for kind in kinds.values()]


def _read_shards(paths: list[Path], wanted: Wanted) -> Iterator[Share]:
    for number, path in enumerate(paths):
        if wanted(number):
            source = open_source(str(path))
            yield _share(number, source, source.read(), shards.verify_shard(path))


def _read_source(path: str, wanted: Wanted) -> Iterator[Share]:
    source = open_source(path)
    number = -1
    for number, share in source.shares(shards.RECORDS_PER_SHARD, wanted):
        if share:
            records = [read_record(entry) for entry in share]
            yield _share(number, source, records, _digest(records))
    if number < 0:
        raise no_record(path)


def _share(number: int, source: Source, records: list[SourceRecord], digest: str) -> Share:
    reading = read_layouts(source, records, "score")
    parsed = [parse_scorable(record) for record in reading.records]
    return Share(number, parsed, [record.where for record in reading.records], digest, reading.description)


def _digest(records: list[SourceRecord]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr((record.id, record.fields)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
