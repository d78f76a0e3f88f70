"""The cache of tokenised data: shards that the processes of a run make together, each once, and all map.

A directory belongs to one key: the content of the data files, the tokenizer, the settings that decide what
becomes of a record, and the versions of all code that does it. Shard i holds what was made of records
i N to (i + 1) N - 1, whoever made it, so its bytes do not depend on the number of processes, and a run that
was killed leaves shards that the next one goes on from. `index.json` is written last and means that all is there.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from exo_megatron.data.entries import Source, SourceEntry, no_record, note_id, source_changed
from exo_megatron.data.shards import content_digest
from exo_megatron.data.tally import Tally
from exo_megatron.errors import DataError, StorageError
from exo_megatron.utils.disk import write_failure
from exo_megatron.utils.files import atomic_open, read_json, sha256_file, write_json
from exo_megatron.utils.progress import Progress
from exo_megatron.utils.team import Team

T = TypeVar("T")

SHARD_RECORDS = 2048
"""Records of a shard: few enough that their texts need little memory, many enough that few files are mapped."""

CACHE_INDEX = "index.json"
_TALLY = b"tally"
_LIBRARIES = ("tokenizers", "transformers", "sentencepiece", "jinja2", "datasets", "pyarrow")
"""Libraries whose version may change what is made of a record."""


@dataclass(frozen=True)
class Recipe:
    """The way to make items of a source.

    Attributes:
        source: the data.
        limit: the number of first records that are taken; None for all.
        settings: JSON values of all else that decides what is made.
        make: makes the table of a share of the records.
        digest: computes the digest of all tables.
    """

    source: Source
    limit: int | None
    settings: Mapping[str, Any]
    make: Callable[[Sequence[SourceEntry]], tuple[pa.RecordBatch, Tally]]
    digest: Callable[[Sequence[pa.RecordBatch]], str]


@dataclass(frozen=True)
class Shelf:
    """All shards of a recipe, memory-mapped.

    Attributes:
        directory: where they lie.
        tables: one per shard.
        tally: what was counted in all records.
        digest: of all items.
    """

    directory: Path
    tables: list[pa.RecordBatch]
    tally: Tally
    digest: str


def prepare(recipe: Recipe, cache: Path | None, team: Team) -> Shelf:
    """Map the shards of a recipe, after making those that are not there.

    Collective over the team. On a file system that nodes share every shard is made once, else once
    per node.

    Args:
        recipe: what is to be made.
        cache: the directory of all caches; None for the user's.
        team: the processes.

    Raises:
        DataError: the source cannot be read, changes meanwhile, has no record or an id twice, or
            nodes have different data.
        StorageError: the cache cannot be written; and what the recipe raises.
    """
    # Before any process computes the key, so that what a shard is made of is what the key says.
    settings = json.dumps([recipe.settings, recipe.limit], sort_keys=True)
    seen = team.together(lambda: (team.node_rank == 0, settings, _states(recipe.source)))
    states = seen[team.rank][2]
    key = team.on_nodes(lambda: _key(recipe))
    # The same number, size and time of change: the file that the first process of a node has read.
    known = (True, settings, states) in seen
    _check_keys(recipe.source, key, team.together(lambda: key if known else _key(recipe)))
    root = cache or default_cache()
    directory = root / key[:32]
    whole = team.together(lambda: team.node_rank != 0 or _is_whole(directory))
    if not all(whole):
        with _writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        shards = _make_shards(recipe, directory, states, team, range(team.rank, sys.maxsize, team.size))
        there = team.share(all(_shard_file(directory, number).exists() for number in range(shards)))
        if not all(there):  # nodes do not share the directory, and each lacks what others made
            _make_shards(recipe, directory, states, team, range(team.node_rank, sys.maxsize, team.node_size))
        team.on_nodes(lambda: _finish(recipe, directory, shards))
    index = read_json(directory / CACHE_INDEX)
    tables = [_map(directory / shard["file"])[0] for shard in index["shards"]]
    return Shelf(directory, tables, Tally.from_json(index["tally"]), index["digest"])


def default_cache() -> Path:
    """Return the user's cache of tokenised data."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "exo-megatron" / "data"


def _key(recipe: Recipe) -> str:
    """Compute the digest of all that decides the shards; it reads all files of the source."""
    parts = {
        "settings": recipe.settings,
        "limit": recipe.limit,
        "files": [[str(file), _look(file, content_digest)] for file in recipe.source.files],
        "shard_records": SHARD_RECORDS,
        "libraries": {name: version(name) for name in _LIBRARIES},
        "code": _code_digest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


_States = list[tuple[int, int, int]]
"""Number, size and time of change of every file of a source."""


def _states(source: Source) -> _States:
    found = [_look(file, Path.stat) for file in source.files]
    return [(status.st_ino, status.st_size, status.st_mtime_ns) for status in found]


def _check_keys(source: Source, key: str, keys: Sequence[str]) -> None:
    """Raise DataError if a process reads other data than the first processes of the nodes."""
    for rank, each in enumerate(keys):
        if each != key:
            raise DataError(
                f"rank {rank}",
                f"reads something else as {source.name} than the other processes of its node",
                expected="the same files, tokenizer and program on all ranks",
                fix="start all ranks in one directory, or give absolute paths",
            )


def _check_unchanged(source: Source, states: _States) -> None:
    if _states(source) != states:
        raise source_changed(source.name)


def _look(file: Path, look: Callable[[Path], T]) -> T:
    try:
        return look(file)
    except OSError as error:
        raise DataError(
            str(file), f"cannot be read ({error.strerror})", expected="a readable file", fix="restore the file"
        ) from None


def _code_digest() -> str:
    """Compute the digest of the modules that turn records into tables."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _is_whole(directory: Path) -> bool:
    """Tell whether the index is there and all shards are as it says. Damaged shards are removed."""
    if not (directory / CACHE_INDEX).exists():
        return False
    try:
        shards = read_json(directory / CACHE_INDEX)["shards"]
    except DataError:  # damaged
        return False
    damaged = [
        file
        for shard in shards
        if not (file := directory / shard["file"]).is_file() or sha256_file(file) != shard["sha256"]
    ]
    for file in damaged:
        _discard(file)
    return not damaged


def _is_finished(file: Path) -> bool:
    """Tell whether a shard is there. One that cannot be read, which no index tells of, is removed."""
    if not file.exists():
        return False
    try:
        _map(file)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):  # any of them, by where the damage is
        _discard(file)
        return False
    return True


def _discard(file: Path) -> None:
    print(f"data: {file} is damaged or missing, and is made again", flush=True)
    file.unlink(missing_ok=True)


def _shard_file(directory: Path, number: int) -> Path:
    return directory / f"shard-{number:05d}.arrow"


def _make_shards(recipe: Recipe, directory: Path, states: _States, team: Team, mine: range) -> int:
    """Make the shards with the numbers `mine`, as far as they are not there.

    Collective over the team. Returns the number of all shards. Raises DataError if the source is no longer in
    these states; the shards that are there are then of what it was before.
    """

    def work() -> int:
        shards = 0
        records = sum(1 for _ in islice(recipe.source.entries(), recipe.limit)) if team.rank == 0 else 0
        label = "tokenising" if team.size == 1 else f"tokenising (with {team.size} processes)"
        with Progress(label, records, "records", enabled=records > SHARD_RECORDS) as progress:
            for number, share in recipe.source.shares(
                SHARD_RECORDS,
                lambda number: number in mine and not _is_finished(_shard_file(directory, number)),
                recipe.limit,
            ):
                shards = number + 1
                if share:
                    with _cycles_kept():
                        made = recipe.make(share)
                    _check_unchanged(recipe.source, states)
                    with _writing(directory):
                        _write(_shard_file(directory, number), *made)
                # The others have come about as far.
                progress.advance(min(SHARD_RECORDS, records - number * SHARD_RECORDS))
        _check_unchanged(recipe.source, states)
        return shards

    return team.together(work)[team.rank]


@contextmanager
def _cycles_kept() -> Iterator[None]:
    """Look for no cycles of garbage in a block: it makes many objects, few cycles, and the search takes a third."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _write(file: Path, table: pa.RecordBatch, tally: Tally) -> None:
    counted = json.dumps(tally.as_json(), sort_keys=True)
    with (
        atomic_open(file, "wb") as sink,
        pa.ipc.new_file(sink, table.schema.with_metadata({_TALLY: counted.encode()})) as writer,
    ):
        writer.write_batch(table)


def _map(file: Path) -> tuple[pa.RecordBatch, Tally]:
    """Map a shard into memory."""
    reader = pa.ipc.open_file(pa.memory_map(str(file)))
    return reader.get_batch(0), Tally.from_json(json.loads(reader.schema.metadata[_TALLY]))


def _finish(recipe: Recipe, directory: Path, shards: int) -> str:
    """Write the index of all shards. Returns the digest of all items."""
    if not shards:
        raise no_record(recipe.source.name)
    files = [_shard_file(directory, number) for number in range(shards)]
    tables, tally = [], Tally()
    for file in files:
        table, counted = _map(file)
        tables.append(table)
        tally.add(counted)
    _check_ids(tables)
    with _cycles_kept():
        digest = recipe.digest(tables)
    stored = [
        {"file": file.name, "items": len(table), "sha256": sha256_file(file)}
        for file, table in zip(files, tables, strict=True)
    ]
    index = {"settings": recipe.settings, "shards": stored, "digest": digest, "tally": tally.as_json()}
    with _writing(directory):
        write_json(directory / CACHE_INDEX, index)
    return digest


def _check_ids(tables: Sequence[pa.RecordBatch]) -> None:
    """Raise DataError if an id occurs twice."""
    ids = pa.chunked_array([table.column("id") for table in tables])
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    places: dict[str, str] = {}
    for table in tables:
        for id, where in zip(table.column("id").to_pylist(), table.column("where").to_pylist(), strict=True):
            note_id(places, id, where)


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Turn failures of the file system in a block into StorageError."""
    try:
        yield
    except OSError as error:
        failure = write_failure(directory, error, needed=None)
        raise StorageError(
            f"data.cache {directory}",
            failure.problem,
            expected=failure.expected,
            fix=f"{failure.fix}, or set data.cache to another directory",
        ) from None
