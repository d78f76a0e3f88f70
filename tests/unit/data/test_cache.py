"""The cache of tokenised data: what its key is made of, what is made again, how several processes share the work."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from exo_megatron.data import cache
from exo_megatron.data.cache import CACHE_INDEX, Recipe, Shelf, prepare
from exo_megatron.data.entries import Source, SourceEntry, read_record
from exo_megatron.data.prepared import Prepared, PromptTable, prompts_digest, prompts_table
from exo_megatron.data.prompts import Prompt
from exo_megatron.data.tally import Tally
from exo_megatron.errors import DataError, ExoError, StorageError
from exo_megatron.utils.team import ALONE, Team

SECONDS = 20.0
"""Time after which processes that wait for each other are an error."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD_RECORDS", 2)


@dataclass
class Kitchen:
    """A file of lines, and recipes that make a prompt of each. `made` are the first records of the shares that were."""

    file: Path
    made: list[str] = field(default_factory=list)
    before: Callable[[str], None] = lambda first: None

    def write(self, lines: Sequence[str]) -> None:
        self.file.write_text("".join(f"{line}\n" for line in lines))

    def recipe(self, **changes: Any) -> Recipe:
        source = Source(str(self.file), "lines", self._entries, (self.file,))
        return Recipe(
            **{"source": source, "limit": None, "settings": {}, "make": self._make, "digest": prompts_digest, **changes}
        )

    def _entries(self) -> Iterator[SourceEntry]:
        for number, line in enumerate(self.file.read_text().split(), start=1):
            yield SourceEntry(f"f:{number}", f"line-{number}", partial(dict, id=line))

    def _make(self, entries: Sequence[SourceEntry]) -> tuple[pa.RecordBatch, Tally]:
        self.before(entries[0].parse()["id"])
        records = [read_record(entry) for entry in entries]
        self.made.append(records[0].id)
        tally = Tally(items=len(records))
        tally.seen.read = len(records)
        return prompts_table([(each.where, Prompt(each.id, each.id, (len(each.id),))) for each in records]), tally


def ids(shelf: Shelf) -> list[str]:
    return [prompt.id for prompt in Prepared(shelf.tables, PromptTable, "")]


def content(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@dataclass
class Threads:
    """A world whose processes are threads; `nodes` are the numbers of processes of its nodes."""

    nodes: tuple[int, ...]

    def run(self, work: Callable[[Team, int], Any]) -> list[Any]:
        """Call `work(team, node)` as every process. Returns results and exceptions in rank order."""
        size = sum(self.nodes)
        places = [(node, rank) for node, count in enumerate(self.nodes) for rank in range(count)]
        barrier, slots, results = threading.Barrier(size, timeout=SECONDS), [None] * size, [None] * size

        def share(rank: int, value: Any) -> list[Any]:
            slots[rank] = value
            barrier.wait()
            gathered = list(slots)
            barrier.wait()
            return gathered

        def process(rank: int) -> None:
            node, node_rank = places[rank]
            team = Team(rank, size, node_rank, self.nodes[node], partial(share, rank))
            try:
                results[rank] = work(team, node)
            except ExoError as error:
                results[rank] = error
            except BaseException as error:
                results[rank] = error
                barrier.abort()

        threads = [threading.Thread(target=process, args=(rank,), daemon=True) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(4 * SECONDS)
            assert not thread.is_alive()
        return results


@pytest.fixture
def kitchen(tmp_path: Path) -> Kitchen:
    kitchen = Kitchen(tmp_path / "data.txt")
    kitchen.write("abcdefghijk")
    return kitchen


LETTERS = list("abcdefghijk")
FIRSTS = list("acegik")
"""The first records of shards of two."""


class TestOneProcess:
    def test_first_and_second_start(self, kitchen: Kitchen, tmp_path: Path) -> None:
        first = prepare(kitchen.recipe(), tmp_path / "cache", ALONE)
        assert kitchen.made == FIRSTS
        assert ids(first) == LETTERS
        assert (first.tally.seen.read, first.tally.items) == (11, 11)
        assert first.digest == prompts_digest(first.tables)
        before = content(first.directory)
        assert list(before) == [CACHE_INDEX, *(f"shard-{number:05d}.arrow" for number in range(6))]
        second = prepare(kitchen.recipe(make=None), tmp_path / "cache", ALONE)
        assert (ids(second), second.tally, second.digest) == (LETTERS, first.tally, first.digest)
        assert content(first.directory) == before

    @pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
    def test_a_damaged_shard_is_made_again_and_told(
        self, kitchen: Kitchen, tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        directory = prepare(kitchen.recipe(), tmp_path / "cache", ALONE).directory
        before, victim = content(directory), directory / "shard-00002.arrow"
        whole = before[victim.name]
        if harm == "remove":
            victim.unlink()
        else:
            victim.write_bytes(whole[:-1] if harm == "cut" else whole.replace(b"e", b"x"))
        kitchen.made.clear()
        shelf = prepare(kitchen.recipe(), tmp_path / "cache", ALONE)
        assert (ids(shelf), kitchen.made) == (LETTERS, ["e"])
        assert content(directory) == before
        assert f"{victim} is damaged or missing, and is made again" in capsys.readouterr().out

    @pytest.mark.parametrize("left", [0, 8, -1, -9, -200, -700])
    def test_a_damaged_shard_without_an_index_is_made_again_and_told(
        self, kitchen: Kitchen, tmp_path: Path, left: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        directory = prepare(kitchen.recipe(), tmp_path / "cache", ALONE).directory
        before, victim = content(directory), directory / "shard-00002.arrow"
        (directory / CACHE_INDEX).unlink()
        victim.write_bytes(before[victim.name][:left])
        kitchen.made.clear()
        assert (ids(prepare(kitchen.recipe(), tmp_path / "cache", ALONE)), kitchen.made) == (LETTERS, ["e"])
        assert content(directory) == before
        assert f"{victim} is damaged or missing, and is made again" in capsys.readouterr().out

    def test_a_damaged_index_is_written_again(self, kitchen: Kitchen, tmp_path: Path) -> None:
        directory = prepare(kitchen.recipe(), tmp_path / "cache", ALONE).directory
        before = content(directory)
        (directory / "index.json").write_text('{"shards": [')
        kitchen.made.clear()
        assert (ids(prepare(kitchen.recipe(), tmp_path / "cache", ALONE)), kitchen.made) == (LETTERS, [])
        assert content(directory) == before

    def test_a_crash_goes_on_from_finished_shards(self, kitchen: Kitchen, tmp_path: Path) -> None:
        whole = prepare(kitchen.recipe(), tmp_path / "whole", ALONE).directory

        def crash(first: str) -> None:
            if first == "g":
                raise KeyboardInterrupt

        kitchen.before = crash
        with pytest.raises(KeyboardInterrupt):
            prepare(kitchen.recipe(), tmp_path / "cache", ALONE)
        (directory,) = (tmp_path / "cache").iterdir()
        assert list(content(directory)) == [f"shard-{number:05d}.arrow" for number in range(3)]
        kitchen.before, kitchen.made = Kitchen.before, []
        assert ids(prepare(kitchen.recipe(), tmp_path / "cache", ALONE)) == LETTERS
        assert kitchen.made == list("gik")
        assert content(directory) == content(whole)

    @pytest.mark.parametrize("moment", ["key", "first", "last"])
    def test_a_file_that_changes_leaves_no_shard_of_what_it_became(
        self, kitchen: Kitchen, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whenever it changes: also between the time that its content decided the directory and the first record."""
        original, key = kitchen.file.stat(), cache._key

        def change() -> None:
            kitchen.write("ABCDEFGHIJK")

        def key_and_change(recipe: Recipe) -> str:
            found = key(recipe)
            change()
            return found

        if moment == "key":
            monkeypatch.setattr(cache, "_key", key_and_change)
        else:
            kitchen.before = lambda first: change() if first == {"first": "a", "last": "k"}[moment] else None
        with pytest.raises(DataError, match=r"data.txt: changed while it was read; .*fix: start again"):
            prepare(kitchen.recipe(), tmp_path / "cache", ALONE)
        monkeypatch.undo()
        monkeypatch.setattr(cache, "SHARD_RECORDS", 2)
        kitchen.before = Kitchen.before
        kitchen.write("abcdefghijk")
        os.utime(kitchen.file, ns=(original.st_atime_ns, original.st_mtime_ns))
        assert ids(prepare(kitchen.recipe(), tmp_path / "cache", ALONE)) == LETTERS

    def test_a_file_that_vanishes_is_told_as_such(self, kitchen: Kitchen, tmp_path: Path) -> None:
        kitchen.before = lambda first: kitchen.file.unlink(missing_ok=True)
        with pytest.raises(DataError, match=r"data.txt: cannot be read \(No such file"):
            prepare(kitchen.recipe(), tmp_path / "cache", ALONE)

    def test_no_record(self, kitchen: Kitchen, tmp_path: Path) -> None:
        kitchen.write([])
        with pytest.raises(DataError, match="holds no record"):
            prepare(kitchen.recipe(), tmp_path / "cache", ALONE)

    def test_limit(self, kitchen: Kitchen, tmp_path: Path) -> None:
        whole = prepare(kitchen.recipe(), tmp_path / "cache", ALONE)
        for limit in (1, 3, 4):
            part = prepare(kitchen.recipe(limit=limit), tmp_path / "cache", ALONE)
            assert ids(part) == LETTERS[:limit] and part.directory != whole.directory

    def test_the_code_is_part_of_the_key(
        self, kitchen: Kitchen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cache, "__file__", str(tmp_path / "code" / "cache.py"))
        (tmp_path / "code").mkdir()
        directories = set()
        for code in ("1", "2", "1"):
            (tmp_path / "code" / "text.py").write_text(code)
            directories.add(prepare(kitchen.recipe(), tmp_path / "cache", ALONE).directory)
        assert len(directories) == 2

    def test_libraries_are_part_of_the_key(
        self, kitchen: Kitchen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = prepare(kitchen.recipe(), tmp_path / "cache", ALONE).directory
        monkeypatch.setattr(cache, "version", lambda name: "99" if name == "tokenizers" else "1")
        assert prepare(kitchen.recipe(), tmp_path / "cache", ALONE).directory != first

    def test_a_cache_that_cannot_be_written(self, kitchen: Kitchen, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file where a directory has to be")
        with pytest.raises(StorageError, match=r"data.cache .*could not be written \(Not a directory\)"):
            prepare(kitchen.recipe(), tmp_path / "cache", ALONE)


class TestProcesses:
    @pytest.mark.parametrize("nodes", [(2,), (3,), (1, 1, 1), (1, 2), (8,)], ids=str)
    def test_each_shard_is_made_once(self, kitchen: Kitchen, tmp_path: Path, nodes: tuple[int, ...]) -> None:
        alone = prepare(kitchen.recipe(), tmp_path / "alone", ALONE)
        kitchen.made.clear()
        shelves = Threads(nodes).run(lambda team, node: prepare(kitchen.recipe(), tmp_path / "cache", team))
        assert sorted(kitchen.made) == FIRSTS
        for shelf in shelves:
            assert (ids(shelf), shelf.digest, shelf.tally) == (LETTERS, alone.digest, alone.tally)
            assert content(shelf.directory) == content(alone.directory)

    def test_second_start(self, kitchen: Kitchen, tmp_path: Path) -> None:
        prepare(kitchen.recipe(), tmp_path / "cache", ALONE)
        shelves = Threads((2,)).run(lambda team, node: prepare(kitchen.recipe(make=None), tmp_path / "cache", team))
        assert [ids(shelf) for shelf in shelves] == [LETTERS] * 2

    def test_every_node_makes_all_where_directories_are_not_shared(self, kitchen: Kitchen, tmp_path: Path) -> None:
        alone = prepare(kitchen.recipe(), tmp_path / "alone", ALONE).directory
        kitchen.made.clear()
        shelves = Threads((1, 2)).run(lambda team, node: prepare(kitchen.recipe(), tmp_path / f"cache{node}", team))
        assert sorted(kitchen.made) == sorted(2 * FIRSTS)
        assert [shelf.directory.parent.name for shelf in shelves] == ["cache0", "cache1", "cache1"]
        for shelf in shelves:
            assert ids(shelf) == LETTERS and content(shelf.directory) == content(alone)

    def test_one_node_has_all_and_one_has_nothing(self, kitchen: Kitchen, tmp_path: Path) -> None:
        prepare(kitchen.recipe(), tmp_path / "cache0", ALONE)
        kitchen.made.clear()
        shelves = Threads((2, 2)).run(lambda team, node: prepare(kitchen.recipe(), tmp_path / f"cache{node}", team))
        assert [ids(shelf) for shelf in shelves] == [LETTERS] * 4
        assert sorted(kitchen.made) == FIRSTS

    def test_nodes_with_other_data_are_refused(self, kitchen: Kitchen, tmp_path: Path) -> None:
        errors = Threads((1, 2)).run(
            lambda team, node: prepare(kitchen.recipe(settings={"node": node}), tmp_path / f"cache{node}", team)
        )
        assert {str(error) for error in errors} == {str(errors[0])}
        assert isinstance(errors[0], DataError) and "nodes of this run read different data" in str(errors[0])
        assert kitchen.made == []

    @pytest.mark.parametrize("settings", [False, True])
    def test_a_process_with_other_data_than_the_first_of_its_node_is_refused(
        self, kitchen: Kitchen, tmp_path: Path, settings: bool
    ) -> None:
        """As with relative paths and directories of their own, or another tokenizer under one name."""
        other = Kitchen(tmp_path / "other" / kitchen.file.name)
        other.file.parent.mkdir()
        other.write("abcdefghijK")

        def work(team: Team, node: int) -> Shelf:
            mine = kitchen.recipe() if team.rank < 2 or settings else other.recipe()
            mine = replace(mine, settings={"rank": 2}) if team.rank == 2 and settings else mine
            return prepare(mine, tmp_path / "cache", team)

        errors = Threads((3,)).run(work)
        assert {type(error) for error in errors} == {DataError}
        assert {error.where for error in errors} == {"rank 2"}
        assert kitchen.made == other.made == []

    def test_a_copy_of_the_same_file_is_the_same_data(self, kitchen: Kitchen, tmp_path: Path) -> None:
        """Its number and times differ, as in containers of the ranks; its content decides."""
        original, reads = cache._states, []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache, "_states", lambda source: [*original(source), (len(reads), reads.append(1), 0)])
            patch.setattr(cache, "_check_unchanged", lambda source, states: None)
            shelves = Threads((2,)).run(lambda team, node: prepare(kitchen.recipe(), tmp_path / "cache", team))
        assert [ids(shelf) for shelf in shelves] == [LETTERS] * 2

    def test_an_error_of_one_process_is_raised_on_all(self, kitchen: Kitchen, tmp_path: Path) -> None:
        def fail(first: str) -> None:
            if first in "ce":  # of the second and the third process
                raise DataError(f"share of {first}", "is bad", expected="good", fix="mend")

        kitchen.before = fail
        errors = Threads((3,)).run(lambda team, node: prepare(kitchen.recipe(), tmp_path / "cache", team))
        assert [error.where for error in errors] == ["share of c"] * 3

    def test_an_id_twice_is_raised_on_all(self, kitchen: Kitchen, tmp_path: Path) -> None:
        kitchen.write("abcda")
        errors = Threads((2,)).run(lambda team, node: prepare(kitchen.recipe(), tmp_path / "cache", team))
        assert [str(error).partition(";")[0] for error in errors] == ["f:5: repeats id 'a' of f:1"] * 2

    def test_a_cache_that_one_process_cannot_write(
        self, kitchen: Kitchen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The others do not wait for it."""
        write = cache._write

        def full(file: Path, *made: Any) -> None:
            if file.name == "shard-00003.arrow":
                raise OSError(28, "No space left on device")
            write(file, *made)

        monkeypatch.setattr(cache, "_write", full)
        errors = Threads((3,)).run(lambda team, node: prepare(kitchen.recipe(), tmp_path / "cache", team))
        assert {type(error) for error in errors} == {StorageError}
        assert all("could not be written: No space left on device" in str(error) for error in errors)

    def test_a_file_that_changes_for_one_process_is_refused_by_all(self, kitchen: Kitchen, tmp_path: Path) -> None:
        kitchen.before = lambda first: kitchen.write("ABCDEFGHIJK") if first == "i" else None
        errors = Threads((3,)).run(lambda team, node: prepare(kitchen.recipe(), tmp_path / "cache", team))
        assert all(isinstance(error, DataError) and "changed while it was read" in str(error) for error in errors)
        kept = b"".join(data for path in (tmp_path / "cache").rglob("*.arrow") for data in [path.read_bytes()])
        assert not set(b"ABCDEFGHIJK") & set(kept.partition(b"ARROW1")[0])
