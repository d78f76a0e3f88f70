"""Readers: the same records from every container, and an error that names the line for every way to be broken."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest

from exo_megatron.data.records import SourceRecord
from exo_megatron.data.sources import open_source, read_jsonl_records
from exo_megatron.errors import ConfigError, DataError

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "The movie", "chosen": " was good"},
    {"id": "b", "prompt": "Das Stück\u2028war", "chosen": " gut"},
    {"id": "c", "prompt": "It", "chosen": " is"},
]


def lines(rows: list[dict[str, Any]] = ROWS) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(source: Path | str, split: str = "train", limit: int | None = None) -> list[SourceRecord]:
    return open_source(str(source), split=split).read(limit)


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

    def test_zstd(self, tmp_path: Path) -> None:
        path = tmp_path / "data.ndjson.zst"
        packed = pyarrow.compress(lines().encode(), codec="zstd", asbytes=True)
        path.write_bytes(packed)
        assert [dict(record.fields) for record in read(path)] == ROWS
        path.write_bytes(packed[:-4])
        assert "cannot be decompressed" in error_of(path)

    @pytest.mark.parametrize("name", ["data.json", "data.json.gz", "data.jsonl"])
    def test_json_array(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        for indent in (None, 2):
            content = json.dumps(ROWS, indent=indent).encode()
            path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
            assert [dict(record.fields) for record in read(path)] == ROWS
        path = tmp_path / "plain.json"
        path.write_text('[{"prompt": "a"}]')
        assert [(record.id, record.where) for record in read(path)] == [("item-1", f"{path} item 1")]

    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    @pytest.mark.parametrize(("name", "between"), [("d.csv", ","), ("d.tsv", "\t"), ("d.csv.gz", ",")])
    def test_separated_values(self, tmp_path: Path, name: str, between: str, end: str) -> None:
        path = tmp_path / name
        table = [["prompt", "chosen"], ["NA", "null"], [f'"a{between} ""b"" {end}c"', "1.50"], ["", "x" * 200_000]]
        content = ("\ufeff" + end.join(between.join(row) for row in table) + end).encode()
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        records = read(path)
        # Nothing is made a number, a null or another line end, as pandas would.
        assert [dict(record.fields) for record in records] == [
            {"prompt": "NA", "chosen": "null"},
            {"prompt": f'a{between} "b" {end}c', "chosen": "1.50"},
            {"prompt": "", "chosen": "x" * 200_000},
        ]
        assert [record.id for record in records] == ["line-2", "line-3", "line-5"]

    def test_arrow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "d"))
        (file,) = (tmp_path / "d").glob("*.arrow")
        assert [dict(record.fields) for record in read(file)] == ROWS

    def test_nulls_of_columnar_data_are_absent(self, tmp_path: Path) -> None:
        datasets.Dataset.from_list([{"prompt": "a", "chosen": None}]).save_to_disk(str(tmp_path / "d"))
        assert [dict(record.fields) for record in read(tmp_path / "d")] == [{"prompt": "a"}]

    def test_directory_of_a_stage(self, tmp_path: Path) -> None:
        (tmp_path / "candidates.jsonl").write_text(lines(), encoding="utf-8")
        (tmp_path / "rollout.json").write_text("{}")
        assert [record.id for record in read(tmp_path)] == ["a", "b", "c"]


class TestShards:
    def test_are_read_in_the_order_of_their_names(self, tmp_path: Path) -> None:
        for number in (2, 0, 1):
            (tmp_path / f"part-{number}.jsonl").write_text(f'{{"prompt": "{number}"}}\n{{"prompt": "more"}}\n')
        (tmp_path / "README.md").write_text("words")
        (tmp_path / ".hidden.jsonl").write_text("not JSON")
        records = read(tmp_path)
        assert [record.fields["prompt"] for record in records[::2]] == ["0", "1", "2"]
        assert [record.id for record in records[:3]] == [
            f"part-{n}.jsonl:line-{m}" for n, m in ((0, 1), (0, 2), (1, 1))
        ]
        assert records[3].where == f"{tmp_path / 'part-1.jsonl'}:2"
        assert open_source(str(tmp_path)).format == "3 files of JSON"

    @pytest.mark.parametrize(
        ("names", "splits"),
        [
            (("train-00000.jsonl", "test-00000.jsonl"), {"train": 1, "test": 1}),
            (("a/train.jsonl", "b/train.jsonl", "b/eval.jsonl"), {"train": 2, "test": 1}),
            (("train/x.jsonl", "valid/x.jsonl"), {"train": 1, "validation": 1}),
            (("data/train_prefs-00000-of-00002.jsonl", "data/train_prefs-00001-of-00002.jsonl"), {"train_prefs": 2}),
            (("contrast.jsonl", "evaluated.jsonl"), {"train": 2}),
        ],
    )
    def test_splits_are_told_by_their_names(
        self, tmp_path: Path, names: tuple[str, ...], splits: dict[str, int]
    ) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(f'{{"prompt": "{name}"}}\n')
        for split, count in splits.items():
            assert len(read(tmp_path, split)) == count
        assert f"has no split 'dev'; expected one of {', '.join(sorted(splits))}" in error_of(tmp_path, "dev")

    def test_doubtful_directories(self, tmp_path: Path) -> None:
        (tmp_path / "train.jsonl").write_text(lines())
        (tmp_path / "more.jsonl").write_text(lines())
        assert "files of the splits train, and one of none: more.jsonl" in error_of(tmp_path)
        (tmp_path / "more.jsonl").rename(tmp_path / "more.csv")
        assert "data files of several kinds: more.csv, train.jsonl" in error_of(tmp_path)


class TestSplits:
    SPECS = (
        "train[:2]",
        "train[1:]",
        "train[-1:]",
        "train[10%:70%]",
        "train[:34%]",
        "train[:999]",
        "train[2:]+train[:1]",
    )

    @pytest.mark.parametrize("spec", SPECS)
    def test_slices_are_those_of_datasets(self, tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        rows = [{"prompt": str(n)} for n in range(7)]
        path = tmp_path / "d.jsonl"
        path.write_text(lines(rows))
        data = datasets.Dataset.from_list(rows)
        data.save_to_disk(str(tmp_path / "saved"))
        data.to_parquet(str(tmp_path / "d.parquet"))
        expected = datasets.load_dataset("json", data_files=str(path), split=spec)["prompt"]
        for source in (path, tmp_path / "saved", tmp_path / "d.parquet"):
            assert [record.fields["prompt"] for record in read(source, spec)] == list(expected)
        assert [record.id for record in read(path, spec)] == [f"line-{int(n) + 1}" for n in expected]

    def test_names_of_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "my_test.jsonl"
        path.write_text(lines())
        assert len(read(path, "test[:2]")) == 2 and len(read(path)) == 3
        assert "has no split 'dev'; expected one of test, train" in error_of(path, "dev")

    @pytest.mark.parametrize("spec", ["train[", "train[a:b]", "", "train[1]", "train[10%:20%](nearest)"])
    def test_bad_slices(self, tmp_path: Path, spec: str) -> None:
        (tmp_path / "d.jsonl").write_text(lines())
        with pytest.raises(ConfigError, match=r"data\.split: got"):
            read(tmp_path / "d.jsonl", spec)

    def test_hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []

        def load_dataset(*arguments: Any, **settings: Any) -> datasets.Dataset:
            calls.append((arguments, settings))
            return datasets.Dataset.from_list(ROWS)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        source = open_source("some/pairs", split="train[1:]", revision="v2", subset="helpful")
        assert [record.id for record in source.read()] == ["b", "c"]
        assert calls == [(("some/pairs", "helpful"), {"split": "train", "revision": "v2"})]
        with pytest.raises(ConfigError, match=r"data\.revision: got 'v2', which has no effect"):
            open_source(str(tmp_path), revision="v2")


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

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (json.dumps({"data": ROWS}), "is one JSON object, which holds its records under 'data'"),
            (
                json.dumps({"version": 1, "data": ROWS}, indent=1),
                "is one JSON object, which holds its records under 'data'",
            ),
            (json.dumps(ROWS[0], indent=1), "is one JSON object over several lines"),
            ('[{"a": 1}', "begins with '[', but is not a JSON array"),
            ('[{"a": 1}, 2]', "item 2: is a JSON int"),
            ("\n[1]", "item 1: is a JSON int"),
        ],
    )
    def test_json_that_is_no_list_of_records(self, tmp_path: Path, content: str, expected: str) -> None:
        path = tmp_path / "data.json"
        path.write_text(content)
        assert expected in error_of(path)

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"a,b\n1,2\n\n1,2,3\n", ":4: has 3 values for 2 columns"),
            (b'a,b\n"1\n2",2\n"open,1\n', ":4: cannot be read as values between ','"),
            (b"a,b,a\n1,2,3\n", ":1: names 'a' twice"),
            (b"a,b\n1,caf\xe9\n", "is not UTF-8"),
            (b"a,b\n", "holds no record"),
        ],
    )
    def test_bad_separated_values(self, tmp_path: Path, content: bytes, expected: str) -> None:
        path = tmp_path / "data.csv"
        path.write_bytes(content)
        assert expected in error_of(path)

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
        assert "holds no data file; expected files of one kind" in error_of(tmp_path / "empty")
        (tmp_path / "x.parquet").write_bytes(b"not parquet")
        assert "cannot be opened" in error_of(tmp_path / "x.parquet")

    def test_only_the_lines_within_the_limit_are_read(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text('{"id": 1}\n{"id": 2}\nbroken\n')
        assert len(read(path, limit=2)) == 2
        with pytest.raises(DataError):
            read_jsonl_records(path)
