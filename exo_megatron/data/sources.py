"""Sources of records: files, directories of them, saved data sets, and data sets of the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

from exo_megatron.config.stages import CANDIDATES_FILE
from exo_megatron.data.entries import Entries, Source, SourceEntry
from exo_megatron.data.records import SourceRecord
from exo_megatron.data.shards import find_shards
from exo_megatron.data.text_files import COMPRESSIONS, READERS, read_json_text
from exo_megatron.errors import ConfigError, DataError, reason
from exo_megatron.utils.files import check_regular

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


BLOCK = 1024
"""Entries of a columnar data set that are read at once."""


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
    if path.exists():
        check_regular(path)
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
        return _open_shards(source, Shards(stored[0].parent, "json", {WHOLE_FILE: stored}), split, names)
    if path.is_dir() and (path / CANDIDATES_FILE).is_file():
        return _open_shards(source, _one_file(path / CANDIDATES_FILE), split, names)
    if path.is_dir() and not (path / "dataset_dict.json").is_file() and not (path / "state.json").is_file():
        return _open_shards(source, _find_shards(path), split, names)
    if path.is_file():
        return _open_shards(source, _one_file(path), split, names)
    if not path.exists() and _means_a_path(source):
        raise DataError(
            source,
            "does not exist",
            expected="a file, a directory or the name of a data set",
            fix="correct data.path",
        )
    return _open_dataset(source, path, split, names, revision, subset)


def read_jsonl_records(path: Path) -> list[SourceRecord]:
    """Read all records of a JSON-lines file.

    A record without an id gets its line number as the id.
    """
    return Source(str(path), "JSON lines", partial(read_json_text, path), (path,)).read()


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
    entries = {name: _entries(source, shards, name) for name in names}
    files = [file for name in names for file in shards.splits[name]]
    described = KIND_NAMES[shards.kind] if len(files) == 1 else f"{len(files)} files of {KIND_NAMES[shards.kind]}"
    return Source(source, described, _take(split, entries), tuple(files))


def _entries(source: str, shards: Shards, name: str) -> Entries:
    """Return the entries of one split."""
    files = shards.splits[name]
    read = READERS.get(shards.kind)
    if read is None:
        return partial(_numbered, _load(source, shards.kind, files), f"{source}[{name}]")
    if len(files) == 1:
        return partial(read, files[0])
    # Lines are numbered within their file, so the names of records say which of several it is.
    return lambda: chain.from_iterable(_named(read(file), str(file.relative_to(shards.root))) for file in files)


def _named(entries: Iterable[SourceEntry], file: str) -> Iterator[SourceEntry]:
    return (entry._replace(place=f"{file}:{entry.place}") for entry in entries)


def _take(split: str, entries: Mapping[str, Entries]) -> Entries:
    """Take the entries of the splits that `split` takes."""
    if split in entries:
        return entries[split]
    taken = _ranges(split, {name: sum(1 for _ in read()) for name, read in entries.items()})
    return lambda: chain.from_iterable(islice(entries[name](), part.start, part.stop) for name, part in taken)


def _numbered(data: Any, where: str, wanted: range | None = None, first: int | None = None) -> Iterator[SourceEntry]:
    """Read entries of a data set, all by default, with their own numbers, or numbered from `first`."""
    wanted = range(len(data)) if wanted is None else wanted
    for start in range(wanted.start, wanted.stop, BLOCK):
        stop = min(start + BLOCK, wanted.stop)
        block = lru_cache(maxsize=1)(partial(_read_block, data, range(start, stop)))
        for k in range(start, stop):
            number = k if first is None else first + k - wanted.start
            yield SourceEntry(f"{where} row {number}", f"row-{number}", partial(_of_block, block, k - start))


def _read_block(data: Any, wanted: range) -> list[dict[str, Any]]:
    return list(data.select(wanted))


def _of_block(block: Callable[[], list[dict[str, Any]]], k: int) -> dict[str, Any]:
    return block()[k]


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
    where = f"{source}[{split}]"
    described = "data set on disk" if path.exists() else "data set of the hub"
    files = tuple(Path(each["filename"]) for name in names for each in loaded[name].cache_files)
    if split in loaded:
        return Source(source, described, partial(_numbered, loaded[split], where), files)
    parts = _ranges(split, {name: len(data) for name, data in loaded.items()})
    if len(parts) == 1:
        ((name, taken),) = parts
        return Source(source, described, partial(_numbered, loaded[name], f"{source}[{name}]", taken), files)
    firsts = accumulate((len(taken) for _, taken in parts), initial=0)
    joined = [
        partial(_numbered, loaded[name], where, taken, first)
        for (name, taken), first in zip(parts, firsts, strict=False)
    ]
    return Source(source, described, lambda: chain.from_iterable(read() for read in joined), files)


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
