"""The input of `score`, read in shares: shards one by one, any other data source so many records at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

from exo_megatron.data import shards
from exo_megatron.data.building import convert_entry
from exo_megatron.data.completions import ScorableRecord, column_names, parse_scorable
from exo_megatron.data.entries import SourceEntry, no_record, note_id, read_record, source_changed
from exo_megatron.data.reading import Interpreter
from exo_megatron.data.sources import open_source
from exo_megatron.data.tally import Tally
from exo_megatron.data.text_files import read_json_text
from exo_megatron.errors import DataError

Wanted = Callable[[int], bool]
"""Function that tells whether the share with this number is wanted."""


@dataclass(frozen=True)
class Share:
    """Consecutive records of the input.

    Attributes:
        number: its place among the shares, from 0.
        records: those that can be used, checked and in their types; there may be none.
        places: where they stand, for messages.
        digest: SHA-256 of what was read, with records that cannot be used.
        format: of the whole input, in words.
        tally: what was counted.
    """

    number: int
    records: list[ScorableRecord]
    places: list[str]
    digest: str
    format: str
    tally: Tally


def read_shares(path: Path, interpreter: Interpreter, wanted: Wanted) -> Iterator[Share]:
    """Read the wanted shares in order; what is in memory at a time is one of them.

    Args:
        path: the output of `rollout`, a file of its records, or any data source whose layout has
            several completions. Shares of shards are these; others have RECORDS_PER_SHARD records.
        interpreter: tells what becomes of a record.
        wanted: tells which shares this process wants.

    Raises:
        DataError: it does not exist or has no record, or a wanted shard, which is named, is damaged.
            Records that cannot be used are counted and left out. Repeated ids are not noticed; see
            `join_surveys`.
    """
    found = shards.find_shards(path)
    if found is None and not path.exists():
        raise DataError(
            str(path), "does not exist", expected="output of `rollout`, or a file", fix="correct candidates"
        )
    return _read_source(str(path), interpreter, wanted) if found is None else _read_shards(found, interpreter, wanted)


def _read_shards(paths: Sequence[Path], interpreter: Interpreter, wanted: Wanted) -> Iterator[Share]:
    for number, path in enumerate(paths):
        if wanted(number):
            digest = shards.verify_shard(path)
            yield _share(number, list(read_json_text(path)), digest, f"{len(paths)} shards", interpreter)


def _read_source(path: str, interpreter: Interpreter, wanted: Wanted) -> Iterator[Share]:
    source = open_source(path)
    found = False
    for number, entries in source.shares(shards.RECORDS_PER_SHARD, wanted):
        found = True
        if entries:
            once = [entry._replace(parse=cache(entry.parse)) for entry in entries]  # the digest reads them, too
            yield _share(number, once, _digest(once), source.format, interpreter)
    if not found:
        raise no_record(path)


def _share(number: int, entries: Sequence[SourceEntry], digest: str, format: str, interpreter: Interpreter) -> Share:
    share = Share(number, [], [], digest, format, Tally())
    for place, entry in enumerate(entries):
        for record in convert_entry(entry, place, interpreter, share.tally):
            try:
                share.records.append(parse_scorable(record))
            except DataError as error:
                share.tally.add_flaw(error, place)
            else:
                share.places.append(record.where)
    share.tally.items = len(share.records)
    return share


def _digest(entries: Iterable[SourceEntry]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        try:
            record = read_record(entry)
            content = repr((record.id, record.fields))
        except DataError as error:
            content = error.problem
        digest.update(content.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


@dataclass(frozen=True)
class Survey:
    """Notes on a share whose records are no longer in memory.

    Attributes:
        number, digest, format, tally: of the share.
        places: ids of its records, and where they stand.
        names: of the columns that its records have.
        completions: number of candidates of all its records.
    """

    number: int
    digest: str
    format: str
    tally: Tally
    places: Sequence[tuple[str, str]]
    names: Sequence[str]
    completions: int


@dataclass(frozen=True)
class Contents:
    """The input as a whole.

    Attributes:
        format: in words.
        digests: of each share.
        names: of the columns that any record has, in order of appearance.
        completions: number of candidates of each share.
        tally: what was counted in all records.
    """

    format: str
    digests: Sequence[str]
    names: Sequence[str]
    completions: Sequence[int]
    tally: Tally

    @property
    def digest(self) -> str:
        """SHA-256 of the whole input."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()

    def check_unchanged(self, path: Path, share: Share) -> None:
        """Raise DataError if a share of the input `path` that is read again is not what it was."""
        if share.digest != self.digests[share.number]:
            raise source_changed(str(path))


def survey(share: Share) -> Survey:
    """Note what is needed of a share after its records."""
    return Survey(
        share.number,
        share.digest,
        share.format,
        share.tally,
        [(record.id, where) for record, where in zip(share.records, share.places, strict=True)],
        column_names(share.records),
        sum(len(record.texts) for record in share.records),
    )


def join_surveys(surveys: Iterable[Survey]) -> Contents:
    """Put the surveys of all shares together, which may come in any order.

    Raises DataError for an id that two records have, and if processes have seen different shares.
    """
    ordered = sorted(surveys, key=lambda each: each.number)
    if [each.number for each in ordered] != list(range(len(ordered))):
        raise source_changed("candidates")
    places: dict[str, str] = {}
    for id, where in chain.from_iterable(each.places for each in ordered):
        note_id(places, id, where)
    tally = Tally()
    for each in ordered:
        tally.add(each.tally)
    return Contents(
        ordered[0].format,
        [each.digest for each in ordered],
        list(dict.fromkeys(chain.from_iterable(each.names for each in ordered))),
        [each.completions for each in ordered],
        tally,
    )


def read_known_shares(path: Path, interpreter: Interpreter, contents: Contents, wanted: Set[int]) -> Iterator[Share]:
    """Read the shares with these numbers in order. Raises DataError if one is not as some process surveyed it."""
    left = set(wanted)
    for share in read_shares(path, interpreter, wanted.__contains__):
        contents.check_unchanged(path, share)
        left.discard(share.number)
        yield share
    if left:
        raise source_changed(str(path))
