"""The input of `score`, read in shares: shards one by one, any other data source so many records at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from exo_megatron.data import shards
from exo_megatron.data.completions import ScorableRecord, column_names, parse_scorable
from exo_megatron.data.entries import no_record, note_id, read_record
from exo_megatron.data.reading import Interpreter, Seen
from exo_megatron.data.records import SourceRecord
from exo_megatron.data.sources import open_source
from exo_megatron.data.text_files import read_json_text
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
        format: of the whole input, in words.
        seen: what the records were taken for.
    """

    number: int
    records: list[ScorableRecord]
    places: list[str]
    digest: str
    format: str
    seen: Seen


def read_shares(path: Path, wanted: Wanted) -> Iterator[Share]:
    """Read the wanted shares in order; what is in memory at a time is one of them.

    Args:
        path: the output of `rollout`, a file of its records, or any data source whose layout has
            several completions. Shares of shards are these; others have RECORDS_PER_SHARD records.
        wanted: tells which shares this process wants.

    Raises:
        DataError: it does not exist or has no record, or a wanted record or shard, which is named, is of
            no use. Repeated ids are not noticed; see `join_surveys`.
    """
    found = shards.find_shards(path)
    if found is None and not path.exists():
        raise DataError(
            str(path), "does not exist", expected="output of `rollout`, or a file", fix="correct candidates"
        )
    return _read_source(str(path), wanted) if found is None else _read_shards(found, wanted)


def _read_shards(paths: Sequence[Path], wanted: Wanted) -> Iterator[Share]:
    for number, path in enumerate(paths):
        if wanted(number):
            digest = shards.verify_shard(path)
            records = [read_record(entry) for entry in read_json_text(path)]
            yield _share(number, records, digest, f"{len(paths)} shards")


def _read_source(path: str, wanted: Wanted) -> Iterator[Share]:
    source = open_source(path)
    found = False
    for number, entries in source.shares(shards.RECORDS_PER_SHARD, wanted):
        found = True
        if entries:
            records = [read_record(entry) for entry in entries]
            yield _share(number, records, _digest(records), source.format)
    if not found:
        raise no_record(path)


def _share(number: int, records: Sequence[SourceRecord], digest: str, format: str) -> Share:
    interpreter, seen = Interpreter("score"), Seen()
    read = [each for record in records for each in interpreter.convert(record, seen)]
    return Share(number, [parse_scorable(each) for each in read], [each.where for each in read], digest, format, seen)


def _digest(records: Sequence[SourceRecord]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr((record.id, record.fields)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


@dataclass(frozen=True)
class Survey:
    """Notes on a share whose records are no longer in memory.

    Attributes:
        number, digest, format, seen: of the share.
        places: ids of its records, and where they stand.
        names: of the columns that its records have.
        completions: number of candidates of all its records.
    """

    number: int
    digest: str
    format: str
    seen: Seen
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
        description: a line that says what the records were taken for.
    """

    digest: str
    names: Sequence[str]
    completions: Sequence[int]
    description: str


def survey(share: Share) -> Survey:
    """Note what is needed of a share after its records."""
    return Survey(
        share.number,
        share.digest,
        share.format,
        share.seen,
        [(record.id, where) for record, where in zip(share.records, share.places, strict=True)],
        column_names(share.records),
        sum(len(record.texts) for record in share.records),
    )


def join_surveys(path: Path, surveys: Iterable[Survey]) -> Contents:
    """Put the surveys of all shares of the input `path` together, which may come in any order.

    Raises DataError for an id that two records have.
    """
    ordered = sorted(surveys, key=lambda each: each.number)
    places: dict[str, str] = {}
    for id, where in chain.from_iterable(each.places for each in ordered):
        note_id(places, id, where)
    seen = Seen()
    for each in ordered:
        seen.add(each.seen)
    return Contents(
        hashlib.sha256("".join(each.digest for each in ordered).encode()).hexdigest(),
        list(dict.fromkeys(chain.from_iterable(each.names for each in ordered))),
        [each.completions for each in ordered],
        Interpreter("score").describe(str(path), ordered[0].format, seen),
    )
