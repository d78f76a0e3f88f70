"""Shards of candidates: written with checksums, read only if all are there, of one run and as they were written."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from exo_megatron.data import shards
from exo_megatron.data.shards import (
    RunShards,
    content_digest,
    count_shards,
    find_shards,
    link_only_shard,
    output_of,
    records_of,
)
from exo_megatron.data.sources import open_source
from exo_megatron.errors import DataError

PER_SHARD = 3
RECORDS = [{"id": f"r{i}", "text": "schön \u2028", "value": i / 3} for i in range(8)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", PER_SHARD)


def write(directory: Path, *, run: str = "run", records: int = len(RECORDS)) -> RunShards:
    writer = RunShards(directory, count_shards(records), run)
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(writer.count):
        part = records_of(range(number, number + 1), records)
        writer.write(number, RECORDS[part.start : part.stop], {"sum": number / 7})
    return writer


def ids(path: Path) -> list[str]:
    return [record.id for record in open_source(str(path)).read()]


def test_records_are_divided_in_order() -> None:
    assert [count_shards(n) for n in (1, 3, 4, 8, 9)] == [1, 1, 2, 3, 3]
    parts = [records_of(range(n, n + 1), 8) for n in range(3)]
    assert parts == [range(3), range(3, 6), range(6, 8)]
    assert records_of(range(1, 3), 8) == range(3, 8)


def test_files_and_what_sha256sum_says_of_them(tmp_path: Path) -> None:
    write(tmp_path)
    names = [f"shard-0000{n}-of-00003.jsonl" for n in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, *(f"{n}.sha256" for n in names)])
    checks = sorted(path.name for path in tmp_path.glob("*.sha256"))
    command = ["sha256sum", "--check", "--strict", *checks]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60).returncode == 0
    (tmp_path / names[1]).write_text("{}\n")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60).returncode == 1


def test_read_by_output_directory_shard_and_hand_made_checksum(tmp_path: Path) -> None:
    writer = write(tmp_path / "candidates")
    (tmp_path / "rollout.json").write_text("{}")
    (tmp_path / "candidates" / "notes.json").write_text("{}")
    everything = [record["id"] for record in RECORDS]
    assert ids(tmp_path) == ids(tmp_path / "candidates") == everything
    assert ids(writer.path(1)) == ["r3", "r4", "r5"]
    assert [output_of(path) for path in (tmp_path, tmp_path / "candidates", writer.path(1))] == [tmp_path] * 3
    assert open_source(str(tmp_path)).format == "3 files of JSON"
    # Whoever edits a shard says with `sha256sum` that this is meant.
    writer.path(2).write_text('{"id": "mine"}\n')
    with open(f"{writer.path(2)}.sha256", "w") as file:
        subprocess.run(["sha256sum", writer.path(2).name], cwd=writer.directory, stdout=file, check=True, timeout=60)
    assert ids(tmp_path) == [*everything[:6], "mine"]


def test_a_single_file_is_read_as_before(tmp_path: Path) -> None:
    (tmp_path / "candidates.jsonl").write_text('{"id": "a"}\n')
    assert ids(tmp_path) == ids(tmp_path / "candidates.jsonl") == ["a"]
    assert output_of(tmp_path / "candidates.jsonl") == output_of(tmp_path) == tmp_path


def append(writer: RunShards) -> None:
    with open(writer.path(1), "a") as file:
        file.write('{"id": "more"}\n')


DAMAGES: dict[str, tuple[Callable[[RunShards], object], str]] = {
    "missing": (lambda w: w.path(1).unlink(), "candidates/shard-00001-of-00003.jsonl: is missing"),
    "last missing": (lambda w: w.path(2).unlink(), "candidates/shard-00002-of-00003.jsonl: is missing"),
    "two missing": (lambda w: [w.path(n).unlink() for n in (0, 2)], "and 1 more are; expected 3 shards"),
    "unfinished": (
        lambda w: Path(f"{w.path(0)}.sha256").unlink(),
        "candidates/shard-00000-of-00003.jsonl: is missing, or its checksum, which tells that it is finished",
    ),
    "truncated": (lambda w: w.path(1).write_text(""), "candidates/shard-00001-of-00003.jsonl: has the SHA-256 e3b0c4"),
    "appended to": (append, "as shard-00001-of-00003.jsonl.sha256 says; fix: restore the file; or remove it and stage"),
    "garbage for a checksum": (
        lambda w: Path(f"{w.path(2)}.sha256").write_text("{}"),
        "shard-00002-of-00003.jsonl: is",
    ),
    "of another file": (
        lambda w: Path(f"{w.path(2)}.sha256").write_text(Path(f"{w.path(1)}.sha256").read_text()),
        "shard-00002-of-00003.jsonl: is missing, or its checksum",
    ),
    "another number": (lambda w: write(w.directory, records=4), "has shards of several runs, such as shard-00001-of-0"),
    "another run": (
        lambda w: RunShards(w.directory, 3, "other").write(1, RECORDS[:3], {}),
        "has shards of several runs, such as shard-00002-of-00003.jsonl and shard-00001-of-00003.jsonl",
    ),
    "beyond the last": (
        lambda w: RunShards(w.directory, 3, "run").write(7, RECORDS[:3], {}),
        "has shards of several runs, such as shard-00007-of-00003.jsonl",
    ),
    "both forms": (
        lambda w: (w.directory.parent / "candidates.jsonl").write_text('{"id": "a"}\n'),
        "holds both candidates.jsonl and shards in candidates/",
    ),
}


def opened(path: Path) -> None:
    """What precedes the reading of a record."""
    for file in open_source(str(path)).files:
        content_digest(file)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    change, words = DAMAGES[name]
    change(write(tmp_path / "candidates"))
    with pytest.raises(DataError) as caught:
        opened(tmp_path)
    assert words in str(caught.value), str(caught.value)
    assert caught.value.fix


def test_a_lone_shard_needs_its_checksum(tmp_path: Path) -> None:
    writer = write(tmp_path)
    Path(f"{writer.path(1)}.sha256").unlink()
    with pytest.raises(DataError, match=re.escape("has no checksum in shard-00001-of-00003.jsonl.sha256")):
        opened(writer.path(1))


def test_the_name_of_the_single_file_stands_for_the_shards(tmp_path: Path) -> None:
    """A link for readers of one file is there if one shard has everything; a copy of it is as good."""
    link = tmp_path / "candidates.jsonl"
    writer = write(tmp_path / "candidates")
    link_only_shard(tmp_path, writer)
    assert not link.exists() and find_shards(link) == [writer.path(number) for number in range(3)]
    for path in (tmp_path / "candidates").iterdir():
        path.unlink()
    writer = write(tmp_path / "candidates", records=2)
    link_only_shard(tmp_path, writer)
    assert link.is_symlink() and link.read_bytes() == writer.path(0).read_bytes()
    assert find_shards(link) == find_shards(tmp_path) == [writer.path(0)]
    link.unlink()
    link.write_bytes(writer.path(0).read_bytes())
    assert find_shards(tmp_path) == [writer.path(0)] and find_shards(link) is None
    link.write_text('{"id": "a"}\n')
    with pytest.raises(DataError, match="holds both"):
        find_shards(tmp_path)
    link.unlink()
    link.symlink_to("candidates/shard-00000-of-00001.jsonl")
    link_only_shard(tmp_path, write(tmp_path / "candidates"))
    assert not link.is_symlink(), "it belongs to an earlier run"


def test_taking_over_keeps_what_this_run_finished_and_removes_the_rest(tmp_path: Path) -> None:
    writer = write(tmp_path)
    (tmp_path / "run.txt").write_text("a file of the user")
    (tmp_path / ".shard-00000-of-00003.jsonl.tmp-77").write_text("half a li")
    RunShards(tmp_path, 2, "run").write(1, RECORDS[:1], {})
    RunShards(tmp_path, 3, "other").write(0, RECORDS[:3], {})
    writer.path(2).write_bytes(writer.path(2).read_bytes()[:-5])
    assert writer.take_over() == {1: {"sum": 1 / 7}}
    left = ["run.txt", "shard-00001-of-00003.jsonl", "shard-00001-of-00003.jsonl.sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert RunShards(tmp_path / "absent", 3, "run").take_over() == {}


def test_a_write_that_fails_leaves_no_finished_shard(tmp_path: Path) -> None:
    writer = write(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer.write(1, [{"value": float("nan")}], {})
    assert sorted(writer.take_over()) == [0, 1, 2], "the old file is untouched"
    assert find_shards(tmp_path) == [writer.path(number) for number in range(3)]
