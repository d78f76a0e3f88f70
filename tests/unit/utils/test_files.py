from __future__ import annotations

import hashlib
import os

import pytest

from exo_megatron.errors import DataError
from exo_megatron.utils.files import (
    atomic_open,
    read_json,
    read_jsonl,
    read_lines,
    sha256_file,
    write_json,
    write_jsonl,
    write_text,
)


def test_atomic_open_replaces(tmp_path):
    path = tmp_path / "a" / "file.txt"
    path.parent.mkdir()
    write_text(path, "one\n")
    write_text(path, "zwei é\n")
    assert path.read_bytes() == "zwei é\n".encode()
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_directory_that_was_taken_away_is_not_made_again(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "gone" / "file.txt", "text")
    assert not (tmp_path / "gone").exists()


def test_nothing_is_seen_before_the_end_or_after_a_failure(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_open(path, "wb") as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_new_files_have_the_usual_permissions(tmp_path):
    write_text(tmp_path / "file", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_content_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
    write_text(tmp_path / "file", "x")
    assert events == ["fsync", "replace", "fsync"]


def test_json(tmp_path):
    value = {"b": [1, 2.5, None, "é"], "a": {}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert list(read_json(tmp_path / "x.json")) == ["b", "a"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"b": float("nan")})
    assert read_json(tmp_path / "x.json") == value


def test_read_json_tells_what_is_wrong(tmp_path):
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(DataError, match=r"x\.json: is not JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(DataError, match="No such file"):
        read_json(tmp_path / "none.json")


def test_jsonl(tmp_path):
    records = [{"text": "line\u2028separator\nand end"}, {"n": 1}]
    write_jsonl(tmp_path / "x.jsonl", records)
    assert list(read_jsonl(tmp_path / "x.jsonl")) == [(1, records[0]), (2, records[1])]


def test_lines_of_other_editors(tmp_path):
    (tmp_path / "x").write_bytes('\ufeff{"a": 1}\r\n\r\n  \n{"b": 2}'.encode())
    assert list(read_lines(tmp_path / "x")) == [(1, '{"a": 1}'), (4, '{"b": 2}')]


@pytest.mark.parametrize(
    ("content", "where", "words"),
    [
        (b'{"a": 1}\n{"a": \n', "x:2", "is not JSON"),
        (b'{"a": 1}\n[1]\n', "x:2", "is a JSON list"),
        (b'{"a": 1}\n\n{"a": "\xff"}\n', "x:3", "byte 8 of the line (0xff) is not UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, where, words):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_jsonl(tmp_path / "x"))
    assert caught.value.where == str(tmp_path / where)
    assert words in caught.value.problem
    assert len(str(caught.value).splitlines()) == 1


def test_lines_before_a_bad_one_are_read(tmp_path):
    (tmp_path / "x").write_bytes(b'{"a": 1}\n{')
    lines = read_jsonl(tmp_path / "x")
    assert next(lines) == (1, {"a": 1})


def test_missing_lines_file(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        list(read_lines(tmp_path / "none"))


def test_sha256(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()
