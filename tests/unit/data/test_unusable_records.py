"""Records that cannot be used: an error with the numbers of all, or left out, told and counted in data_report.json."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from exo_megatron.config.sections import DataConfig
from exo_megatron.data.candidates import Candidate, CandidateRecord, write_candidates
from exo_megatron.data.dataset import DATA_REPORT, load_groups, load_prompts
from exo_megatron.data.groups import Group, data_digest
from exo_megatron.data.logprob_source import LogprobSource
from exo_megatron.data.stored_logprobs import WantedLogprobs
from exo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from exo_megatron.errors import EmptyError, EqualRewards, OverlongPrompt, StoredLogprobsError
from tests.unit.data.loader import BAD, DULL, GOOD, LIMITS, LONG, Loader, Row, names, pair, rewarded

KINDS = ("overlong prompt", "overlong answer", "empty", "equal pair", "equal rewards", "malformed")

# A record of every kind that cannot be used, between four that can. Shards of two records part them.
GOOD_ROWS = ("a", "b", "c", "d")
ROWS: list[Row] = [
    pair("a"),
    pair("long prompt", prompt="The movie" + LONG),
    b'{"prompt": "The movie", "chosen"',
    pair("b"),
    pair("long answer", rejected=LONG),
    pair("empty", chosen=" "),
    pair("equal", rejected=GOOD),
    rewarded("equal rewards", 1, 1),
    b'{"prompt": "The movie", "chosen": "\xff", "rejected": "x"}',
    rewarded("c", 2, 1),
    pair("long answer 2", chosen=LONG),
    pair("d"),
    pair("no number", chosen=3),
]
COUNTS = Counter({"malformed": 3, "overlong answer": 2, **dict.fromkeys(KINDS[:1] + KINDS[2:5], 1)})


@pytest.mark.usefixtures("shards")
class TestError:
    def test_the_first_record_is_named_with_the_numbers_of_all(self, loader: Loader) -> None:
        error = loader.error(loader.groups, ROWS, **LIMITS)
        assert error.where == f"{loader.file}:2"
        assert isinstance(error, OverlongPrompt)
        assert f"of {len(ROWS)} records {sum(COUNTS.values())} cannot be used" in error.problem
        for kind, count in COUNTS.items():
            assert f"{count} {kind}" in error.problem
        assert error.fix.endswith("or set data.on_overlong=skip to leave out all such records")

    def test_the_report_is_there_all_the_same(self, loader: Loader) -> None:
        loader.error(loader.groups, ROWS, **LIMITS)
        assert Counter({kind: flaw["count"] for kind, flaw in loader.report["left_out"].items()}) == COUNTS

    def test_it_is_the_first_of_those_that_are_not_left_out(self, loader: Loader) -> None:
        error = loader.error(loader.groups, ROWS, on_overlong="skip", **LIMITS)
        assert error.where == f"{loader.file}:3" and "is not JSON" in error.problem
        assert error.fix.endswith("or set data.on_invalid=skip to leave out all such records")
        error = loader.error(loader.groups, ROWS, on_invalid="skip", **LIMITS)
        assert error.where == f"{loader.file}:2" and isinstance(error, OverlongPrompt)

    def test_one_alone_is_told_without_numbers(self, loader: Loader) -> None:
        error = loader.error(loader.groups, [pair("a"), pair("b"), pair("c", chosen="")])
        assert error.where == f"{loader.file}:3" and "cannot be used" not in error.problem and "skip" not in error.fix


@pytest.mark.usefixtures("shards")
class TestSkip:
    def test_what_remains(self, loader: Loader) -> None:
        groups = loader.groups(ROWS, on_invalid="skip", on_overlong="skip", **LIMITS)
        assert names(groups) == list(GOOD_ROWS)
        movie, it = (tuple(loader.tokenizer.encode_prompt(text)) for text in ("The movie", "It"))
        good, bad = loader.ids(GOOD), loader.ids(BAD)
        expected = [
            *(Group(name, movie, (good, bad)) for name in "ab"),
            Group("c", it, (good, bad), rewards=(2.0, 1.0)),
            Group("d", movie, (good, bad)),
        ]
        assert list(groups) == expected == groups[:]
        assert groups.digest == data_digest(expected)

    def test_what_is_told(self, loader: Loader) -> None:
        loader.groups(ROWS, on_invalid="skip", on_overlong="skip", **LIMITS)
        for kind, count in COUNTS.items():
            (line,) = (line for line in loader.told if f"records left out: {kind} " in line)
            assert line.startswith(f"data: {count} of {len(ROWS)} records")
        (line,) = (line for line in loader.told if "malformed" in line)
        assert f"the first: {loader.file}:3: is not JSON" in line

    def test_what_is_reported(self, loader: Loader) -> None:
        loader.groups(ROWS, on_invalid="skip", on_overlong="skip", **LIMITS)
        report = loader.report
        assert (report["source"], report["records"], report["items"]) == (str(loader.file), len(ROWS), 4)
        firsts = {
            "overlong prompt": 2,
            "overlong answer": 5,
            "empty": 6,
            "equal pair": 7,
            "equal rewards": 8,
            "malformed": 3,
        }
        assert report["left_out"].keys() == COUNTS.keys() == firsts.keys()
        for kind, flaw in report["left_out"].items():
            assert (flaw["count"], flaw["first_record"]) == (COUNTS[kind], firsts[kind] - 1)
            assert flaw["where"] == f"{loader.file}:{firsts[kind]}" and flaw["problem"] and flaw["expected"]

    def test_answers_of_a_conversation_count_for_themselves(self, loader: Loader, chat: Tokenizer) -> None:
        def turns(*answers: str) -> list[dict[str, str]]:
            asked = {"role": "user", "content": "It"}
            return [turn for answer in answers for turn in (asked, {"role": "assistant", "content": answer})]

        loader.tokenizer = chat
        rows: list[Row] = [{"messages": turns(GOOD, "", BAD, LONG, DULL)}, {"messages": turns(GOOD)}]
        settings = {"train_on": "all", "on_invalid": "skip", "on_overlong": "skip", "max_completion_tokens": 12}
        groups = loader.groups(rows, purpose="sft", **settings)
        assert names(groups) == ["line-1#1", "line-1#3", "line-1#5", "line-2"]
        (line,) = (line for line in loader.told if "left out: empty" in line)
        assert line.startswith("data: 1 of 6 records left out")

    def test_nothing_left_is_an_error(self, loader: Loader) -> None:
        rows: list[Row] = [pair("a", chosen=""), pair("b", chosen=""), pair("c", rejected=LONG)]
        error = loader.error(loader.groups, rows, on_invalid="skip", on_overlong="skip", **LIMITS)
        assert error.where == str(loader.file)
        assert "no record that can be used: " in error.problem
        assert "2 empty" in error.problem and "1 overlong answer" in error.problem

    def test_an_id_in_two_shards_is_refused(self, loader: Loader) -> None:
        error = loader.error(loader.groups, [pair("a"), pair("b"), pair("c"), pair("d"), pair("b")], on_invalid="skip")
        assert error.where == f"{loader.file}:5" and f"repeats id 'b' of {loader.file}:2" in error.problem

    def test_prompts(self, loader: Loader) -> None:
        rows: list[Row] = [
            {"prompt": "It"},
            b"\xff",
            {"prompt": "It" + LONG},
            {"prompt": 3},
            {"id": "last", "prompt": "The movie"},
        ]
        prompts = loader.prompts(rows, on_invalid="skip", on_overlong="skip", **LIMITS)
        assert [(prompt.id, prompt.text) for prompt in prompts] == [("line-1", "It"), ("last", "The movie")]
        assert {kind: flaw["count"] for kind, flaw in loader.report["left_out"].items()} == {
            "malformed": 2,
            "overlong prompt": 1,
        }


class TestMalformed:
    """The first line of a file decides what kind of file it is, and may itself be what is wrong."""

    @pytest.mark.parametrize("first", [b'{"prompt"', b"\xff\xfe", b'{"prompt": "\xff"}'])
    def test_first_line(self, loader: Loader, first: bytes) -> None:
        groups = loader.groups([first, pair("a"), b"\xff", pair("b")], on_invalid="skip")
        assert names(groups) == ["a", "b"]
        assert loader.report["left_out"]["malformed"]["where"] == f"{loader.file}:1"
        assert loader.report["left_out"]["malformed"]["count"] == 2

    def test_an_id_that_is_no_text(self, loader: Loader) -> None:
        groups = loader.groups([pair("a"), pair("\ud83d"), pair("b")], on_invalid="skip")
        assert names(groups) == ["a", "b"]
        error = loader.error(loader.groups, [pair("\ud83d")])
        assert error.where == f"{loader.file}:1" and "'id'" in error.problem

    @pytest.mark.parametrize("value", [datetime.date(2026, 1, 1), float("nan")])
    def test_a_message_that_cannot_be_stored(self, tmp_path: Path, chat: Tokenizer, value: Any) -> None:
        template = "{% for m in messages %}{{ m['content'] }}{{ 1 if m['mark'] }}{% endfor %}"
        tokenizer = load_tokenizer(chat.path, chat_template=template)
        messages = [[{"role": "user", "content": "The movie?", "mark": mark}] for mark in (None, value)]
        if isinstance(value, datetime.date):
            file = tmp_path / "data.parquet"
            pyarrow.parquet.write_table(pa.table({"prompt": messages}), file)
        else:
            file = tmp_path / "data.jsonl"
            file.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in messages))
        (prompt,) = load_prompts(DataConfig(path=str(file), on_invalid="skip"), tokenizer, report=tmp_path)
        assert prompt.chat is not None and prompt.chat.messages == ({"role": "user", "content": "The movie?"},)
        flaw = json.loads((tmp_path / DATA_REPORT).read_text())["left_out"]["malformed"]
        assert flaw["count"] == 1 and "a value that is not JSON" in flaw["problem"]


class TestTies:
    ROWS = (rewarded("a", 1, 2), rewarded("level", 4, 4), pair("same", rejected=GOOD), pair("empty", chosen=""))

    def test_ties_alone_are_left_out(self, loader: Loader) -> None:
        assert names(loader.groups(list(self.ROWS[:3]), ties="skip")) == ["a"]
        assert {kind: flaw["count"] for kind, flaw in loader.report["left_out"].items()} == {
            "equal rewards": 1,
            "equal pair": 1,
        }
        assert isinstance(loader.error(loader.groups, list(self.ROWS), ties="skip"), EmptyError)

    def test_the_message_says_how(self, loader: Loader) -> None:
        error = loader.error(loader.groups, list(self.ROWS))
        assert isinstance(error, EqualRewards) and error.where == f"{loader.file}:2"
        assert "set ties=skip" in error.fix and "data.on_invalid" not in error.fix

    def test_invalid_records_include_them(self, loader: Loader) -> None:
        assert names(loader.groups(list(self.ROWS), on_invalid="skip")) == ["a"]


class TestStoredLogprobs:
    def test_those_of_another_source_are_never_left_out(self, loader: Loader) -> None:
        source, other = (LogprobSource(mark * 32, 0.8, "bf16") for mark in ("a1", "b2"))
        records = [
            CandidateRecord(
                f"r{number}",
                "p",
                (1, 9),
                tuple(Candidate("x", y, True, -1.0, drawn.digest((1, 9), y)) for y in ((5, 2), (6, 2))),
                (0.0, 1.0),
                drawn,
            )
            for number, drawn in enumerate((source, other))
        ]
        write_candidates(loader.file, records)
        config = DataConfig(path=str(loader.file), on_invalid="skip", on_overlong="skip")
        with pytest.raises(StoredLogprobsError) as error:
            load_groups(config, loader.tokenizer, purpose="rewards", logprobs=WantedLogprobs(source, Path("runs/sft")))
        assert error.value.where == f"{loader.file}:2"
