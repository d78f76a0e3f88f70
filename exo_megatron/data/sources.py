"""Sources of records: files, directories of them, saved data sets, and data sets of the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from exo_megatron.config.stages import CANDIDATES_DIRECTORY, CANDIDATES_FILE
from exo_megatron.data.records import SourceRecord
from exo_megatron.data.shards import find_shards, verify_shard
from exo_megatron.data.text_files import COMPRESSIONS, READERS, RawRecord, read_json_text
from exo_megatron.errors import ConfigError, DataError, reason

KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Kinds of files by the end of the name, to which those of text may add one of COMPRESSIONS."""

KIND_NAMES = {"json": "JSON", "csv": "separated values", "parquet": "parquet", "arrow": "Arrow"}

WHOLE_FILE = "train"
"""Name of the one split of a file or directory whose name names no other."""

_SPLIT = re.compile(r"(?P<name>\w+(?:\.\w+)*)(?:\[[^\]]*\])?(?:\(\w+\))?")

_SHARD_OF_SPLIT = re.compile(r"data/(?P<name>\w+(?:\.\w+)*)-\d{5}-of-\d{5}\.")
"""Names of files in data sets of the hub."""

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of files that name a split, as `datasets` reads them."""

_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Source:
    """The entries of a data source, which are read as they are iterated over.

    Attributes:
        name: path or name, as the user gave it.
        format: its kind in words, such as "JSON lines" or "3 parquet files".
        entries: the entries of the wanted split or slice.
    """

    name: str
    format: str
    entries: Iterable[RawRecord]

    def read(self, limit: int | None = None) -> list[SourceRecord]:
        """Read all records, or the first `limit`.

        A record without an id gets its place as the id. Raises DataError for entries that cannot be read,
        a repeated id, and no record at all.
        """
        records: list[SourceRecord] = []
        places: dict[str, str] = {}
        for where, place, entry in islice(self.entries, limit):
            fields = {name: value for name, value in entry.items() if value is not None}
            record = SourceRecord(where, _identifier(where, fields.get("id"), place), fields)
            if record.id in places:
                raise DataError(
                    where, f"repeats id {record.id!r} of {places[record.id]}", expected="unique ids", fix="rename one"
                )
            places[record.id] = where
            records.append(record)
        if not records:
            raise DataError(self.name, "holds no record", expected="at least one record", fix="check data.path")
        return records


def open_source(
    source: str, *, split: str = WHOLE_FILE, revision: str | None = None, subset: str | None = None
) -> Source:
    """Open a data source.

    Args:
        source: a file (see KINDS); a directory that a stage wrote candidates into, or with
            candidates.jsonl, or that `Dataset.save_to_disk` made, or that holds files of one kind; or
            the name of a data set on the hub.
        split: name of a split, or a slice of it such as `train[:1000]` or `train[10%:20%]`, as
            `datasets` writes them.
        revision, subset: of a data set on the hub.

    Raises:
        DataError: it cannot be opened, or has no such split.
        ConfigError: a split that cannot be read, or a revision or subset of something local.
    """
    path = Path(source).expanduser()
    names = _split_names(split)
    if path.exists() or _means_a_path(source):
        for key, value in (("data.revision", revision), ("data.subset", subset)):
            if value is not None:
                raise ConfigError(
                    key,
                    f"got {value!r}, which has no effect: {source} is local",
                    expected="no such setting for a file or directory",
                    fix=f"remove {key}",
                )
    stored = find_shards(path)
    if stored is not None:
        for shard in stored:
            verify_shard(shard)
        return _open_shards(source, Shards(stored[0].parent, "json", {WHOLE_FILE: stored}), split, names)
    if path.is_dir() and (path / CANDIDATES_FILE).is_file():
        return _open_shards(source, _one_file(path / CANDIDATES_FILE), split, names)
    if path.is_dir() and not (path / "dataset_dict.json").is_file() and not (path / "state.json").is_file():
        return _open_shards(source, _find_shards(path), split, names)
    if path.is_file():
        return _open_shards(source, _one_file(path), split, names)
    if not path.exists() and _means_a_path(source):
        instead = path.name == CANDIDATES_FILE and find_shards(path.parent)
        raise DataError(
            source,
            "does not exist",
            expected="a file, a directory or the name of a data set",
            fix=f"name {path.parent}, whose {CANDIDATES_DIRECTORY}/ has them" if instead else "correct data.path",
        )
    return _open_dataset(source, path, split, names, revision, subset)


def read_jsonl_records(path: Path) -> list[SourceRecord]:
    """Read all records of a JSON-lines file.

    A record without an id gets its line number as the id.
    """
    return Source(str(path), "JSON lines", read_json_text(path)).read()


def _identifier(where: str, value: object, place: str) -> str:
    if value is None:
        return place
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(where, f"'id' is {value!r}", expected="a non-empty string or an integer", fix="correct the id")
    return str(value)


def _means_a_path(source: str) -> bool:
    """Tell whether the user meant a file or directory, not a hub name (`name` or `owner/name`)."""
    return (
        source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith((*KINDS, *COMPRESSIONS, ".txt"))
    )


def _split_names(split: str) -> list[str]:
    """Return the names of the splits of which `split` takes all or a slice, one after another."""
    parts = [_SPLIT.fullmatch(part.strip()) for part in split.split("+")]
    if None in parts:
        raise ConfigError(
            "data.split",
            f"got {split!r}",
            expected="a name, or a slice such as train[:1000] or train[10%:20%]",
            fix="correct data.split",
        )
    return [part["name"] for part in parts if part is not None]


def _ranges(split: str, sizes: Mapping[str, int]) -> list[tuple[str, range]]:
    """Return the entries that `split` takes of splits of these sizes, as `datasets` rounds and cuts them."""
    import datasets

    try:
        taken = datasets.ReadInstruction.from_spec(split).to_absolute(dict(sizes))
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            "data.split",
            f"got {split!r} ({reason(error)})",
            expected="a name, or a slice such as train[:1000] or train[10%:20%]",
            fix="correct data.split",
        ) from None
    return [(each.splitname, range(each.from_, each.to)) for each in taken]


def _no_split(source: str, name: str, present: Iterable[str]) -> DataError:
    return DataError(
        source, f"has no split {name!r}", expected=f"one of {', '.join(sorted(present))}", fix="set data.split"
    )


@dataclass(frozen=True)
class Shards:
    """Files of one kind below a directory, in order, by the split that their names name."""

    root: Path
    kind: str
    splits: Mapping[str, Sequence[Path]]


def _one_file(path: Path) -> Shards:
    kind = _kind_of(path)
    if kind is None:
        raise DataError(
            str(path),
            f"is an unknown kind of file {path.name!r}",
            expected=f"a name that ends with one of {', '.join(KINDS)}, or .gz or .zst after those of text",
            fix="rename or convert the file",
        )
    return Shards(path.parent, kind, {name: [path] for name in (WHOLE_FILE, *_split_of(path.name))})


def _find_shards(root: Path) -> Shards:
    """Find the files of a directory, in the order of their names.

    Raises DataError if there are none, they are of several kinds, or only some of them name a split.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        kind, relative = _kind_of(path), path.relative_to(root)
        hidden = any(part.startswith((".", "_")) for part in relative.parts)
        if kind is not None and path.is_file() and not hidden and path.name not in _NOT_DATA:
            files.setdefault(kind, []).append(path)
    if len(files) != 1:
        found = ", ".join(f"{each[0].relative_to(root)}" for each in files.values())
        raise DataError(
            str(root),
            f"has data files of several kinds: {found}" if files else "holds no data file",
            expected=f"files of one kind ({', '.join(KINDS)})",
            fix="name one file, or a directory with files of one kind",
        )
    ((kind, found_files),) = files.items()
    splits: dict[str, list[Path]] = {}
    for path in found_files:
        for name in _split_of(path.relative_to(root).as_posix()) or ("",):
            splits.setdefault(name, []).append(path)
    unnamed = splits.pop("", [])
    if unnamed and splits:
        raise DataError(
            str(root),
            f"has files of the splits {', '.join(sorted(splits))}, and one of none: {unnamed[0].relative_to(root)}",
            expected="a split in the name of every file, or of none",
            fix="rename or move the file",
        )
    return Shards(root, kind, splits or {WHOLE_FILE: unnamed})


def _kind_of(path: Path) -> str | None:
    kind = KINDS.get(path.suffix)
    if path.suffix in COMPRESSIONS:
        kind = KINDS.get(path.with_suffix("").suffix)
        return kind if kind in READERS else None
    return kind


def _split_of(name: str) -> tuple[str, ...]:
    """Return the split that the name of a file (with folders) names, or nothing."""
    shard = _SHARD_OF_SPLIT.search(name)
    if shard is not None:
        return (shard["name"],)
    for part in reversed(name.lower().split("/")):
        words = re.split(r"[^a-z]+", part)
        for split, known in _SPLIT_WORDS.items():
            if any(word in known for word in words):
                return (split,)
    return ()


def _open_shards(source: str, shards: Shards, split: str, names: Sequence[str]) -> Source:
    """Open files of one kind, whose entries stand one after another."""
    for name in names:
        if name not in shards.splits:
            raise _no_split(source, name, shards.splits)
    entries: dict[str, Iterable[RawRecord]] = {}
    for name in names:
        files = shards.splits[name]
        read = READERS.get(shards.kind)
        if read is None:
            entries[name] = _numbered(_load(source, shards.kind, files), f"{source}[{name}]")
        else:
            # Lines are numbered within their file, so the names of records say which of several it is.
            single = len(files) == 1
            entries[name] = chain.from_iterable(
                read(file) if single else _named(read(file), str(file.relative_to(shards.root))) for file in files
            )
    count = sum(len(shards.splits[name]) for name in names)
    described = KIND_NAMES[shards.kind] if count == 1 else f"{count} files of {KIND_NAMES[shards.kind]}"
    return Source(source, described, _take(split, entries))


def _named(entries: Iterable[RawRecord], file: str) -> Iterator[RawRecord]:
    return ((where, f"{file}:{place}", fields) for where, place, fields in entries)


def _take(split: str, entries: Mapping[str, Iterable[RawRecord]]) -> Iterable[RawRecord]:
    """Take the entries of the splits that `split` takes."""
    if split in entries:
        return entries[split]
    listed = {name: list(each) for name, each in entries.items()}
    taken = _ranges(split, {name: len(each) for name, each in listed.items()})
    return [entry for name, numbers in taken for entry in listed[name][numbers.start : numbers.stop]]


def _numbered(entries: Any, where: str) -> Iterator[RawRecord]:
    return ((f"{where} row {n}", f"row-{n}", entry) for n, entry in enumerate(entries))


def _open_dataset(
    source: str, path: Path, split: str, names: Sequence[str], revision: str | None, subset: str | None
) -> Source:
    """Open what `save_to_disk` wrote, or a data set of the hub.

    Its entries are numbered within their split; where several are joined, within what is taken of all.
    """
    import datasets

    loaded: dict[str, Any] = {}
    if path.exists():
        with _errors_of_datasets(source, split):
            stored = datasets.load_from_disk(str(path))
        found = stored if isinstance(stored, dict) else {WHOLE_FILE: stored, str(stored.split or WHOLE_FILE): stored}
        for name in names:
            if name not in found:
                raise _no_split(source, name, found)
            loaded[name] = found[name]
    else:
        for name in names:
            with _errors_of_datasets(source, split):
                loaded[name] = datasets.load_dataset(source, subset, split=name, revision=revision)
    parts = [(loaded[split], range(len(loaded[split])))] if split in loaded else []
    if not parts:
        parts = [(loaded[name], taken) for name, taken in _ranges(split, {n: len(d) for n, d in loaded.items()})]
    where = f"{source}[{split}]"
    if len(parts) == 1:
        data, taken = parts[0]
        entries: Iterable[tuple[int, Any]] = zip(taken, data.select(taken), strict=True)
        where = f"{source}[{names[0]}]"
    else:
        entries = enumerate(chain.from_iterable(data.select(taken) for data, taken in parts))
    described = "data set on disk" if path.exists() else "data set of the hub"
    return Source(source, described, ((f"{where} row {n}", f"row-{n}", entry) for n, entry in entries))


def _load(source: str, kind: str, files: Sequence[Path]) -> Any:
    """Open columnar files as one data set."""
    import datasets

    with _errors_of_datasets(source, WHOLE_FILE):
        return datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train")


@contextmanager
def _errors_of_datasets(source: str, split: str) -> Iterator[None]:
    try:
        yield
    # `datasets` raises dozens of unrelated types for a source that it cannot read.
    except Exception as error:
        raise DataError(
            source,
            f"cannot be opened as a data set with split {split!r} ({reason(error)})",
            expected=f"a local file ({', '.join(KINDS)}), a directory, or a data set's name",
            fix="check data.path and data.split",
        ) from None
