"""The score stage on candidates of a user's making: named columns, and records that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from exo_megatron.config.document import config_digest
from exo_megatron.config.stages import ScoreConfig
from exo_megatron.data import shards
from exo_megatron.data.sources import open_source
from exo_megatron.errors import ConfigError, DataError
from exo_megatron.stages import score
from exo_megatron.utils.files import read_json
from tests.reference.candidates import stored_lines
from tests.unit.conftest import LoneRuntime

PER_SHARD = 4


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", PER_SHARD)
    CALLS.clear()


CALLS: list[tuple[str, str]] = []


def judge(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    CALLS.extend(zip(prompts, completions, strict=True))
    return [float(completion.split()[-1]) for completion in completions]


def by_grade(prompts: Sequence[str], completions: Sequence[str], grade: Sequence[int]) -> list[float]:
    return [float(value) for value in grade]


def by_roles(prompts: Sequence[str], completions: Sequence[str], messages: Sequence[Any]) -> list[float]:
    assert all([message["role"] for message in chat] == ["user", "assistant"] for chat in messages)
    return [float(len(chat)) for chat in messages]


def score_file(path: Path, output: Path, function: str = "judge", **data: Any) -> list[dict[str, Any]]:
    settings = {
        "output": output,
        "candidates": path,
        "data": data,
        "reward": {"function": f"{__name__}:{function}", "batch_size": 3},
    }
    score.run_score(ScoreConfig.model_validate(settings), LoneRuntime())  # type: ignore[arg-type]
    return stored_lines(output)


def write_lines(path: Path, lines: Sequence[object]) -> Path:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))
    return path


def row(number: int) -> dict[str, Any]:
    return {"id": f"r{number}", "prompt": f"p{number}", "completions": [f" {10 * number}", f" {10 * number + 1}"]}


def scored(number: int) -> dict[str, Any]:
    return {**row(number), "rewards": [10.0 * number, 10.0 * number + 1]}


class TestColumns:
    ROWS = (
        {"question": "a", "answers": [" 1", " 2"], "prompt": "not this", "candidates": 7, "grade": 3},
        {"question": "b", "answers": [" 3"], "prompt": "nor this", "candidates": 7, "grade": 4},
    )
    COLUMNS: ClassVar = {"prompt": "question", "completions": "answers"}

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return write_lines(tmp_path / "mine.jsonl", self.ROWS)

    def test_records_are_written_in_our_names_with_the_other_columns(self, file: Path, tmp_path: Path) -> None:
        assert score_file(file, tmp_path / "out", columns=self.COLUMNS) == [
            {"id": "line-1", "prompt": "a", "completions": [" 1", " 2"], "rewards": [1.0, 2.0], "grade": 3},
            {"id": "line-2", "prompt": "b", "completions": [" 3"], "rewards": [3.0], "grade": 4},
        ]
        lines = score_file(file, tmp_path / "graded", "by_grade", columns=self.COLUMNS)
        assert [line["rewards"] for line in lines] == [[3.0, 3.0], [4.0]]

    def test_what_is_written_can_be_scored_again_without_columns(self, file: Path, tmp_path: Path) -> None:
        first = score_file(file, tmp_path / "out", columns=self.COLUMNS)
        assert score_file(tmp_path / "out", tmp_path / "again") == first

    def test_other_columns_are_scored_anew(self, file: Path, tmp_path: Path) -> None:
        score_file(file, tmp_path / "out", columns=self.COLUMNS)
        CALLS.clear()
        score_file(file, tmp_path / "out", columns=self.COLUMNS)
        assert not CALLS
        lines = score_file(file, tmp_path / "out", columns={**self.COLUMNS, "prompt": "prompt"})
        assert [line["prompt"] for line in lines] == ["not this", "nor this"]
        score_file(file, tmp_path / "out", "by_roles", columns=self.COLUMNS, transcript="messages")

    def test_a_column_that_no_record_has_and_one_that_no_layout_has(self, file: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"data\.columns\.system: got 'nothing', which is no column of"):
            score_file(file, tmp_path / "out", columns={**self.COLUMNS, "system": "nothing"})
        with pytest.raises(ConfigError, match=r"data\.columns\.prmpt: is no column that a layout has"):
            score_file(file, tmp_path / "out", columns={"prmpt": "question"})

    def test_strings_become_messages(self, file: Path, tmp_path: Path) -> None:
        lines = score_file(file, tmp_path / "out", "by_roles", columns=self.COLUMNS, transcript="messages")
        assert lines[0]["prompt"] == [{"role": "user", "content": "a"}] and lines[0]["rewards"] == [2.0, 2.0]


BAD = ["no JSON", {"prompt": "p", "completions": []}, {"prompt": "p", "completions": [7]}, {"prompt": "p"}]
"""Of each kind that `score` knows: three malformed ones and one that is empty."""


class TestUnusableRecords:
    LINES = (row(0), BAD[0], row(2), row(3), *BAD, row(8), row(9))
    """A share with one, a share of nothing else, and one without."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return write_lines(tmp_path / "mine.jsonl", self.LINES)

    def test_the_error_has_the_counts_of_all(self, file: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError) as caught:
            score_file(file, tmp_path / "out", function="missing")
        assert caught.value.where == f"{file}:2"
        assert "(of 10 records 5 cannot be used: 4 malformed, 1 empty)" in caught.value.problem
        assert caught.value.fix.endswith("or set data.on_invalid=skip to leave out all such records")
        assert read_json(tmp_path / "out" / "data_report.json")["left_out"]["malformed"]["count"] == 4

    def test_the_others_are_scored_and_those_counted(
        self, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert score_file(file, tmp_path / "out", on_invalid="skip") == [scored(n) for n in (0, 2, 3, 8, 9)]
        told = capsys.readouterr().out
        assert f"data: 4 of 10 records left out: malformed (the first: {file}:2: " in told
        assert f"data: 1 of 10 records left out: empty (the first: {file}:6: 'completions' is empty)" in told
        report = read_json(tmp_path / "out" / "data_report.json")
        assert (report["source"], report["records"], report["items"]) == (str(file), 10, 5)
        assert {kind: each["count"] for kind, each in report["left_out"].items()} == {"malformed": 4, "empty": 1}
        assert read_json(tmp_path / "out" / "score.json")["prompts"] == 5

    def test_a_shard_without_a_record_is_read_by_the_next_stage(self, file: Path, tmp_path: Path) -> None:
        score_file(file, tmp_path / "out", on_invalid="skip")
        sizes = [path.stat().st_size for path in sorted((tmp_path / "out" / "candidates").glob("*.jsonl"))]
        assert len(sizes) == 3 and sizes[1] == 0
        assert [each.id for each in open_source(str(tmp_path / "out")).read()] == [
            "r0",
            "r2",
            "r3",
            "r8",
            "r9",
        ]
        assert score_file(tmp_path / "out", tmp_path / "again") == stored_lines(tmp_path / "out")

    def test_shards_are_kept_whatever_is_done_with_others(self, tmp_path: Path) -> None:
        file = write_lines(tmp_path / "good.jsonl", [row(n) for n in range(6)])
        score_file(file, tmp_path / "out")
        CALLS.clear()
        score_file(file, tmp_path / "out", on_invalid="skip")
        assert not CALLS

    def test_nothing_but_such_records(self, tmp_path: Path) -> None:
        file = write_lines(tmp_path / "mine.jsonl", BAD)
        with pytest.raises(DataError, match="has no record that can be used: 3 malformed, 1 empty"):
            score_file(file, tmp_path / "out", on_invalid="skip")

    def test_a_file_that_changes_after_it_was_checked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = write_lines(tmp_path / "mine.jsonl", [row(n) for n in range(6)])
        build = score.build_reward

        def change(*arguments: Any) -> Any:
            write_lines(file, [*(row(n) for n in range(5)), BAD[0]])
            return build(*arguments)

        monkeypatch.setattr(score, "build_reward", change)
        with pytest.raises(DataError, match=r"mine\.jsonl: changed while it was read"):
            score_file(file, tmp_path / "out", on_invalid="skip")


def test_a_stage_that_names_no_data_has_the_digest_that_it_had() -> None:
    """So a stage that an earlier version completed does not run again."""
    plain = {"output": "o", "candidates": "c", "reward": {"function": "a:b"}}
    digest = "17a43516b6175b42a6bb38242b16501d04c6db36244bf6794e2557f1fc6c519f"
    assert config_digest(ScoreConfig.model_validate(plain)) == digest
    for data in ({"on_invalid": "skip"}, {"columns": {"prompt": "question"}}, {"transcript": "messages"}):
        assert config_digest(ScoreConfig.model_validate({**plain, "data": data})) != digest
