"""Shards of stored records: JSON-lines files in one directory, each with a checksum that tells that it is finished.

A shard holds RECORDS_PER_SHARD consecutive records, the last one fewer. Its name says how many there are,
so that a missing one is noticed. `sha256sum -c` reads the checksum files; their first line, a comment to it,
tells the run that wrote the shard.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exo_megatron.config.stages import CANDIDATES_DIRECTORY, CANDIDATES_FILE, COMPLETE_FILE
from exo_megatron.errors import DataError
from exo_megatron.utils.files import atomic_open, json_line, sha256_file, write_text

RECORDS_PER_SHARD = 1024
CHECKSUM_SUFFIX = ".sha256"
RESUME = "run the stage that writes them again: it goes on from the finished shards"

_NAME = re.compile(r"shard-(?P<number>\d{5,})-of-(?P<count>\d{5,})\.jsonl")
_CHECKSUM = re.compile(r"# (?P<comment>\{.*\})\n(?P<sha256>[0-9a-f]{64})  (?P<name>[^\n]+)\n")
_PLAIN_CHECKSUM = re.compile(r"(?P<sha256>[0-9a-f]{64}) [ *](?P<name>[^\n]+)\n?")
"""What `sha256sum` itself writes, for shards that a user made or edited."""

Notes = Mapping[str, Any]
"""JSON values that a stage keeps beside a shard, such as sums over its records."""


@dataclass(frozen=True)
class _Checksum:
    """The content of a checksum file. `run` is None for one that `sha256sum` wrote."""

    sha256: str
    run: str | None
    notes: Notes


def count_shards(records: int) -> int:
    """Return the number of shards of so many records."""
    return -(-records // RECORDS_PER_SHARD)


def records_of(shards: range, records: int) -> range:
    """Return the numbers of the records in consecutive shards of `records` in all."""
    return range(shards.start * RECORDS_PER_SHARD, min(shards.stop * RECORDS_PER_SHARD, records))


@dataclass(frozen=True)
class RunShards:
    """The shards of one run of a stage.

    Attributes:
        directory: where they go.
        count: number of all shards.
        run: digest of all that decides what the shards hold.
    """

    directory: Path
    count: int
    run: str

    def path(self, number: int) -> Path:
        """Return the path of a shard."""
        return self.directory / f"shard-{number:05d}-of-{self.count:05d}.jsonl"

    def write(self, number: int, records: Iterable[object], notes: Notes) -> None:
        """Write a shard, a JSON value per line, and then its checksum, both atomically.

        Raises ValueError for NaN and infinities.
        """
        path = self.path(number)
        digest = hashlib.sha256()
        with atomic_open(path, "wb") as file:
            for record in records:
                line = json_line(record).encode()
                digest.update(line)
                file.write(line)
        comment = json.dumps({"run": self.run, "notes": notes}, ensure_ascii=False, allow_nan=False)
        write_text(_checksum_path(path), f"# {comment}\n{digest.hexdigest()}  {path.name}\n")

    def take_over(self) -> dict[int, Notes]:
        """Return the notes of the shards that this run has finished, and remove all others.

        Called by one process, before any writes. Makes the directory.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        finished: dict[int, Notes] = {}
        for number in range(self.count):
            path = self.path(number)
            checksum = _read_checksum(path) if path.is_file() else None
            if checksum is not None and checksum.run == self.run and sha256_file(path) == checksum.sha256:
                finished[number] = checksum.notes
        kept = {self.path(number) for number in finished}
        for path in self.directory.glob("*shard-*"):
            # Hidden ones are what a killed process was writing.
            name = path.name.removeprefix(".").partition(".jsonl")[0] + ".jsonl"
            if _NAME.fullmatch(name) and (path.name.startswith(".") or path.with_name(name) not in kept):
                path.unlink()
        return finished


def find_shards(path: Path) -> list[Path] | None:
    """List the shards that `path` stands for, in order; None if it is something else.

    Their content is not read; see `verify_shard`.

    Args:
        path: a directory of shards, the output of a stage with such a directory, the name of the
            single file that stands for them there, or one shard.

    Raises:
        DataError: a shard is missing or not finished, they are of several runs, or the directory
            also has another single file of candidates.
    """
    if path.name == CANDIDATES_FILE and (path.is_symlink() or not path.exists()):
        path = path.parent
    if path.is_file():
        return [path] if _NAME.fullmatch(path.name) else None
    inner = path / CANDIDATES_DIRECTORY
    if not _holds_shards(inner):
        return _complete(path) if _holds_shards(path) else None
    found = _complete(inner)
    if (path / CANDIDATES_FILE).exists() and not _is_copy(path / CANDIDATES_FILE, found):
        raise DataError(
            str(path),
            f"holds both {CANDIDATES_FILE} and shards in {CANDIDATES_DIRECTORY}/",
            expected="one of them",
            fix=f"name {inner} or {path / CANDIDATES_FILE}, or remove the older one",
        )
    return found


def _is_copy(file: Path, shards: Sequence[Path]) -> bool:
    """Tell whether a file is the link to the only shard, or what a copy of the directory made of it."""
    checksum = _read_checksum(shards[0])
    return file.is_symlink() or (len(shards) == 1 and checksum is not None and sha256_file(file) == checksum.sha256)


def link_only_shard(output: Path, shards: RunShards) -> None:
    """Make candidates.jsonl a link to the shard if there is one alone, for readers of a single file."""
    link = output / CANDIDATES_FILE
    if link.is_symlink():
        link.unlink()
    if shards.count == 1 and not link.exists():
        with suppress(OSError):  # a file system without links
            link.symlink_to(shards.path(0).relative_to(output))


def verify_shard(path: Path) -> str:
    """Return the SHA-256 of a shard. Raises DataError if it is not the one of its checksum file."""
    checksum = _read_checksum(path)
    if checksum is None:
        raise DataError(
            str(path),
            f"has no checksum in {_checksum_path(path).name}",
            expected="a shard that is finished, which its checksum tells",
            fix=f"restore the checksum, or {RESUME}",
        )
    found = sha256_file(path)
    if found != checksum.sha256:
        raise DataError(
            str(path),
            f"has the SHA-256 {found}",
            expected=f"{checksum.sha256}, as {_checksum_path(path).name} says",
            fix=f"restore the file; or remove it and {COMPLETE_FILE} beside {CANDIDATES_DIRECTORY}/ and {RESUME}",
        )
    return found


def content_digest(path: Path) -> str:
    """Return the SHA-256 of a file. Raises DataError for a shard that is not the one of its checksum file."""
    return verify_shard(path) if _NAME.fullmatch(path.name) else sha256_file(path)


def output_of(path: Path) -> Path:
    """Return the directory of the files that describe candidates: that of a file, the output of a stage."""
    directory = path if path.is_dir() else path.parent
    return directory.parent if _holds_shards(directory) else directory


def _complete(directory: Path) -> list[Path]:
    """List all shards of a directory. Raises DataError if one is missing or they do not belong together."""
    found = {name: match for name in _shard_names(directory) if (match := _NAME.fullmatch(name))}
    counts = {match["count"]: name for name, match in sorted(found.items())}
    writer = RunShards(directory, int(next(iter(counts))), "")
    paths = [writer.path(number) for number in range(writer.count)]
    strange = sorted(found.keys() - {path.name for path in paths})
    if strange:
        raise _several_runs(directory, [*counts.values(), *strange])
    checksums = {path: _read_checksum(path) if path.is_file() else None for path in paths}
    missing = [path for path, checksum in checksums.items() if checksum is None]
    if missing:
        others = f", and {len(missing) - 1} more are" if len(missing) > 1 else ""
        raise DataError(
            str(missing[0]),
            f"is missing, or its checksum, which tells that it is finished{others}",
            expected=f"{len(paths)} shards, each with its checksum (*{CHECKSUM_SUFFIX})",
            fix=f"restore them, or {RESUME}",
        )
    # `sha256sum` knows no run: whoever used it says that the shard belongs there.
    runs = {each.run: path.name for path, each in checksums.items() if each is not None and each.run is not None}
    if len(runs) > 1:
        raise _several_runs(directory, list(runs.values()))
    return paths


def _several_runs(directory: Path, names: Sequence[str]) -> DataError:
    return DataError(
        str(directory),
        f"has shards of several runs, such as {names[0]} and {names[1]}",
        expected="the shards of one run",
        fix="remove those of the other, or name another directory",
    )


def _holds_shards(directory: Path) -> bool:
    return directory.is_dir() and any(_shard_names(directory))


def _shard_names(directory: Path) -> Iterator[str]:
    """Yield the names of the shards in a directory, and of those that only the checksum is there of."""
    for path in directory.iterdir():
        if _NAME.fullmatch(name := path.name.removesuffix(CHECKSUM_SUFFIX)):
            yield name


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + CHECKSUM_SUFFIX)


def _read_checksum(path: Path) -> _Checksum | None:
    """Read the checksum of the shard `path`; None for a missing or malformed one, or one of another file."""
    try:
        content = _checksum_path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    match = _CHECKSUM.fullmatch(content)
    plain = _PLAIN_CHECKSUM.fullmatch(content)
    found = match or plain
    if found is None or found["name"] != path.name:
        return None
    if match is None:
        return _Checksum(found["sha256"], None, {})
    try:
        comment = json.loads(match["comment"])
    except ValueError:
        return None
    return _Checksum(found["sha256"], comment.get("run"), comment.get("notes", {}))
