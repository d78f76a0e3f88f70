"""Readers: the same records from every container, and an error that names the line for every way to be broken."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from exo_megatron.data.records import SourceRecord, read_jsonl_records, read_records
from exo_megatron.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "The movie", "chosen": " was good"},
    {"id": "b", "prompt": "Das Stück\u2028war", "chosen": " gut"},
    {"id": "c", "prompt": "It", "chosen": " is"},
]


def lines(rows: list[dict[str, Any]] = ROWS) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(source: Path | str, split: str = "train", limit: int | None = None) -> list[SourceRecord]:
    return read_records(str(source), split=split, limit=limit)


def error_of(source: Path | str, split: str = "train") -> str:
    with pytest.raises(DataError) as error:
        read(source, split)
    text = str(error.value)
    assert "\n" not in text
    return text


class TestContainers:
    def test_json_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text(lines(), encoding="utf-8")
        records = read(path)
        assert [dict(record.fields) for record in records] == ROWS
        assert [record.id for record in records] == ["a", "b", "c"]
        assert records[1].where == f"{path}:2"
        assert [record.id for record in read(path, limit=2)] == ["a", "b"]

    def test_gzip(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl.gz"
        path.write_bytes(gzip.compress(lines().encode()))
        assert [dict(record.fields) for record in read(path)] == ROWS

    def test_blank_lines_and_byte_order_mark(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        path.write_bytes(b"\xef\xbb\xbf" + lines().encode().replace(b"\n", b"\r\n\n") + b"\n")
        assert [record.where for record in read(path)] == [f"{path}:{n}" for n in (1, 3, 5)]

    def test_saved_to_disk(self, tmp_path: Path) -> None:
        data = datasets.Dataset.from_list(ROWS)
        data.save_to_disk(str(tmp_path / "one"))
        datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(str(tmp_path / "dict"))
        assert [dict(record.fields) for record in read(tmp_path / "one")] == ROWS
        records = read(tmp_path / "dict", split="test")
        assert [dict(record.fields) for record in records] == ROWS[2:]
        assert records[0].where == f"{tmp_path / 'dict'}[test] row 0"
        assert "no split 'dev'; expected one of test, train" in error_of(tmp_path / "dict", split="dev")

    def test_parquet_and_directories_of_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        folder = tmp_path / "data"
        folder.mkdir()
        datasets.Dataset.from_list(ROWS).to_parquet(str(folder / "train.parquet"))
        assert [dict(record.fields) for record in read(folder / "train.parquet")] == ROWS
        assert [dict(record.fields) for record in read(folder)] == ROWS

    def test_nulls_of_columnar_data_are_absent(self, tmp_path: Path) -> None:
        datasets.Dataset.from_list([{"prompt": "a", "chosen": None}]).save_to_disk(str(tmp_path / "d"))
        assert [dict(record.fields) for record in read(tmp_path / "d")] == [{"prompt": "a"}]

    def test_directory_of_a_stage(self, tmp_path: Path) -> None:
        (tmp_path / "candidates.jsonl").write_text(lines(), encoding="utf-8")
        (tmp_path / "rollout.json").write_text("{}")
        assert [record.id for record in read(tmp_path)] == ["a", "b", "c"]


class TestIdentifiers:
    def test_line_numbers_and_rows_stand_in(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text('{"prompt": "a"}\n\n{"prompt": "b", "id": 7}\n{"prompt": "c", "id": null}\n')
        assert [record.id for record in read(path)] == ["line-1", "7", "line-4"]
        datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}]).save_to_disk(str(tmp_path / "d"))
        assert [record.id for record in read(tmp_path / "d")] == ["row-0", "row-1"]

    def test_repeated_and_wrong(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text('{"id": 1}\n{"id": 2}\n{"id": "1"}\n')
        assert f"{path}:3: repeats id '1' of {path}:1" in error_of(path)
        for wrong in ("true", '""', "1.5", "[1]"):
            path.write_text(f'{{"id": {wrong}}}\n')
            assert f"{path}:1: 'id' is" in error_of(path)


class TestBrokenFiles:
    @pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            (b'{"prompt": "a" "chosen"}', "is not JSON"),
            (b'{"prompt": "trunc', "is not JSON"),
            (b'["prompt"]', "is a JSON list"),
            (b"[" * 100_000, "is not JSON"),
            (b'{"prompt": "caf\xe9"}', "byte 16 of the line"),
        ],
    )
    def test_bad_line(self, tmp_path: Path, suffix: str, line: bytes, expected: str) -> None:
        path = tmp_path / f"data{suffix}"
        content = b'{"prompt": "fine"}\n' + line
        path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
        message = error_of(path)
        assert message.startswith(f"{path}:2: {expected}")
        assert "fix:" in message

    def test_no_record(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        for content in ("", "\n \n"):
            path.write_text(content)
            assert error_of(path).startswith(f"{path}: holds no record")

    def test_damaged_gzip(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl.gz"
        whole = gzip.compress(lines([{"prompt": str(n)} for n in range(5000)]).encode())
        for content in (b"plain text", whole[: len(whole) // 2], whole[:2000] + b"\xff" * 50 + whole[2050:]):
            path.write_bytes(content)
            assert "gzip" in error_of(path) or f"{path}:" in error_of(path)

    def test_sources_that_are_not_there(self, tmp_path: Path) -> None:
        for source in (tmp_path / "absent.jsonl", "absent.jsonl", "./absent", "~/absent-folder", "a/b/c"):
            assert "does not exist" in error_of(source)
        assert "cannot be opened as a data set with split 'train'" in error_of("nobody-at-all/no-such-data")

    def test_sources_of_an_unknown_kind(self, tmp_path: Path) -> None:
        (tmp_path / "data.txt").write_text("words")
        assert "unknown kind of file 'data.txt'" in error_of(tmp_path / "data.txt")
        (tmp_path / "empty").mkdir()
        assert "cannot be opened" in error_of(tmp_path / "empty")
        (tmp_path / "x.parquet").write_bytes(b"not parquet")
        assert "cannot be opened" in error_of(tmp_path / "x.parquet")

    def test_only_the_lines_within_the_limit_are_read(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text('{"id": 1}\n{"id": 2}\nbroken\n')
        assert len(read(path, limit=2)) == 2
        with pytest.raises(DataError):
            read_jsonl_records(path)
