"""Records that cannot be used: an error with the numbers of all, or left out, told and counted in data_report.json."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from exo_megatron.config.losses import LossSpec
from exo_megatron.config.sections import DataConfig
from exo_megatron.data import cache
from exo_megatron.data.candidates import Candidate, CandidateRecord, write_candidates
from exo_megatron.data.dataset import DATA_REPORT, load_groups, load_prompts
from exo_megatron.data.groups import Group, data_digest
from exo_megatron.data.logprob_source import LogprobSource
from exo_megatron.data.prepared import PreparedGroups
from exo_megatron.data.reading import Seen
from exo_megatron.data.stored_logprobs import WantedLogprobs
from exo_megatron.data.tally import ERRORS, Tally
from exo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from exo_megatron.errors import DataError, EmptyError, EqualRewards, OverlongPrompt, StoredLogprobsError
from tests.unit.data.tokenizers_made_here import CHAT_TEMPLATE

GOOD, BAD, DULL = " was good .", " was bad .", " is not so dull ."
LONG = " was really great and not so dull" * 6
LIMITS = {"max_prompt_tokens": 8, "max_completion_tokens": 12}
KINDS = ("overlong prompt", "overlong answer", "empty", "equal pair", "equal rewards", "malformed")

Row = dict[str, Any] | bytes


def pair(name: str, **fields: Any) -> Row:
    return {"id": name, "prompt": "The movie", "chosen": GOOD, "rejected": BAD, **fields}


def rewarded(name: str, *rewards: float, answers: tuple[str, ...] = (GOOD, BAD, DULL)) -> Row:
    return {"id": name, "prompt": "It", "completions": list(answers[: len(rewards)]), "rewards": list(rewards)}


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


@dataclass
class Loader:
    """Loads rows of a file in a directory; `told` are the lines of the last load."""

    directory: Path
    tokenizer: Tokenizer
    told: list[str] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.directory / "data.jsonl"

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.directory / DATA_REPORT).read_text(encoding="utf-8"))

    def config(self, rows: list[Row], **settings: Any) -> DataConfig:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        self.file.write_bytes(b"".join(line + b"\n" for line in lines))
        return DataConfig(path=str(self.file), cache=self.directory / "cache", **settings)

    def groups(self, rows: list[Row], *, purpose: Any = "preference", ties: Any = "error", **data: Any):
        self.told.clear()
        config = self.config(rows, **data)
        return load_groups(
            config, self.tokenizer, purpose=purpose, ties=ties, tell=self.told.append, report=self.directory
        )

    def prompts(self, rows: list[Row], **data: Any):
        self.told.clear()
        return load_prompts(self.config(rows, **data), self.tokenizer, tell=self.told.append, report=self.directory)

    def error(self, load: Callable[..., object], rows: list[Row], **settings: Any) -> DataError:
        with pytest.raises(DataError) as error:
            load(rows, **settings)
        assert "\n" not in str(error.value)
        return error.value

    def ids(self, completion: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode_completion(completion, prompt="x"))


@pytest.fixture
def loader(tmp_path: Path, spm: Tokenizer) -> Loader:
    return Loader(tmp_path, spm)


@pytest.fixture(params=[2, 3, 2048])
def shards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of few records, and one of all."""
    monkeypatch.setattr(cache, "SHARD_RECORDS", request.param)


def names(groups: PreparedGroups) -> list[str]:
    return [group.id for group in groups]


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


class TestTruncation:
    def test_the_end_of_the_prompt_is_kept_behind_bos(self, loader: Loader) -> None:
        rows: list[Row] = [pair("short"), pair("long", prompt="The movie" + LONG)]
        short, long = loader.groups(rows, on_overlong="truncate_prompt_left", **LIMITS)
        whole = loader.tokenizer.encode_prompt("The movie" + LONG)
        (bos,) = loader.tokenizer.prefix_ids
        assert whole[0] == bos
        assert long.prompt == (bos, *whole[-7:])
        assert short.prompt == tuple(loader.tokenizer.encode_prompt("The movie"))
        assert long.candidates == short.candidates
        assert "data: 1 of 2 prompts cut on the left to 8 tokens (data.max_prompt_tokens)" in loader.told

    def test_there_may_be_no_room_for_bos(self, loader: Loader) -> None:
        rows: list[Row] = [{"prompt": "The movie" + LONG}]
        (prompt,) = loader.prompts(rows, on_overlong="truncate_prompt_left", max_prompt_tokens=1)
        assert prompt.ids == (loader.tokenizer.encode_prompt("The movie" + LONG)[-1],)

    def test_long_answers_are_as_invalid_ones(self, loader: Loader) -> None:
        rows: list[Row] = [pair("a"), pair("b", chosen=LONG)]
        error = loader.error(loader.groups, rows, on_overlong="truncate_prompt_left", **LIMITS)
        assert error.where == f"{loader.file}:2" and "'chosen'" in error.problem
        assert names(loader.groups(rows, on_overlong="truncate_prompt_left", on_invalid="skip", **LIMITS)) == ["a"]
        assert loader.report["left_out"]["overlong answer"]["count"] == 1

    def test_what_is_left_out_is_not_counted_as_cut(self, loader: Loader) -> None:
        cut = {"prompt": "The movie" + LONG}
        rows: list[Row] = [pair("a", **cut), pair("b", rejected=GOOD, **cut), pair("c", chosen=LONG, **cut)]
        settings = {"on_overlong": "truncate_prompt_left", "on_invalid": "skip", **LIMITS}
        assert names(loader.groups(rows, **settings)) == ["a"]
        assert list(loader.report["remarks"].values()) == [1]

    @pytest.mark.parametrize("bos", ["", "<s>"])
    def test_chat(self, tmp_path: Path, chat: Tokenizer, bos: str) -> None:
        tokenizer = load_tokenizer(chat.path, chat_template=bos + CHAT_TEMPLATE)
        loader = Loader(tmp_path, tokenizer)
        rows: list[Row] = [{"prompt": [{"role": "user", "content": "The movie" + LONG}]}]
        (whole,) = loader.prompts(rows)
        (prompt,) = loader.prompts(rows, on_overlong="truncate_prompt_left", **LIMITS)
        first = tokenizer.prefix_ids if bos else ()
        assert len(whole.ids) > 8 and (whole.ids[:1] == tokenizer.prefix_ids) == bool(bos)
        assert prompt.ids == (*first, *whole.ids[len(first) - 8 :])
        assert (prompt.text, prompt.chat) == (whole.text, whole.chat)

    def test_prompts_of_stored_candidates_are_never_cut(self, loader: Loader) -> None:
        long = CandidateRecord("a", "The movie", (1, *[9] * 8), (Candidate("x", (5, 2), True, None),) * 2, (1.0, 0.0))
        write_candidates(loader.file, [long])
        stored: list[Row] = [json.loads(loader.file.read_text())]
        for load in (loader.groups, loader.prompts):
            error = loader.error(load, stored, on_overlong="truncate_prompt_left", **LIMITS)
            assert isinstance(error, OverlongPrompt) and "9 tokens" in error.problem
        error = loader.error(loader.groups, stored, on_overlong="truncate_prompt_left", on_invalid="skip", **LIMITS)
        assert "no record that can be used: 1 overlong prompt" in error.problem


class TestRemarks:
    def test_duplicates_and_equal_rewards_stay(self, loader: Loader) -> None:
        rows: list[Row] = [
            rewarded("a", 1, 2, 3),
            rewarded("twice", 1, 2, 3, answers=(GOOD, BAD, GOOD)),
            rewarded("level", 4, 4, 4),
            rewarded("both", 4, 4, answers=(GOOD, GOOD)),
        ]
        groups = loader.groups(rows, purpose="rewards", on_invalid="skip", on_overlong="skip")
        assert names(groups) == ["a", "twice", "level", "both"]
        assert groups[1].candidates == tuple(map(loader.ids, (GOOD, BAD, GOOD)))
        assert "data: 2 of 4 groups have the same candidate more than once" in loader.told
        (line,) = (line for line in loader.told if "equal rewards only" in line)
        assert line.startswith("data: 2 of 4 groups ")
        assert sorted(loader.report["remarks"].values()) == [2, 2] and not loader.report["left_out"]

    def test_the_same_rejected_answer_twice(self, loader: Loader) -> None:
        (group,) = loader.groups([pair("a", rejected=[BAD, DULL, BAD])])
        assert len(group.candidates) == 4
        assert "data: 1 groups have the same candidate more than once" in loader.told

    def test_nothing_is_told_of_groups_without(self, loader: Loader) -> None:
        loader.groups([rewarded("a", 1, 2, 3), rewarded("b", 1, 1, 3)], purpose="rewards")
        assert loader.report["remarks"] == {}
        assert not any("groups have" in line for line in loader.told)


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


@pytest.mark.usefixtures("shards")
class TestFieldsOfSomeRecords:
    SPEC = LossSpec("none", "rewards", ("beta_pi",), token_logps=True)

    def test_the_first_group_without_is_named(self, loader: Loader) -> None:
        have: dict[str, Any] = {
            name: [[-1.0] * len(loader.ids(GOOD)), [-1.0] * len(loader.ids(BAD))]
            for name in ("reference_token_logprobs", "behaviour_token_logprobs")
        }
        rows = [{**rewarded(name, 1, 2), **(have if name in "abc" else {})} for name in "abcde"]  # type: ignore[dict-item]
        with pytest.raises(DataError) as error:
            load_groups(loader.config(list(rows)), loader.tokenizer, purpose="rewards", loss=self.SPEC)
        assert error.value.where == f"{loader.file}:4" and f"but {loader.file}:1 has" in error.value.problem


class TestTally:
    def test_counts_come_back_from_json(self) -> None:
        tally = Tally(
            seen=Seen(9, 11, Counter({("pair", ("chosen", "prompt")): 5, ("prompts", ("prompt",)): 4}), {"b", "a"}),
            items=7,
            remarks=Counter({"groups have something": 3}),
            sizes=Counter({4: 2, 8: 1}),
            temperatures=Counter({None: 1, 0.8: 2}),
            fields={"log": ("f:1", None), "ref": (None, "f:2"), "both": ("f:1", "f:2")},
        )
        for place, (_, error) in enumerate(ERRORS.items()):
            tally.add_flaw(error(f"f:{place}", "is bad", expected="good", fix="mend"), place)
        back = Tally.from_json(json.loads(json.dumps(tally.as_json(), sort_keys=True)))
        for kind, flaw in tally.flaws.items():
            mine = back.flaws[kind]
            assert type(mine.first) is type(flaw.first) is ERRORS[kind]
            assert (mine.count, mine.place, str(mine.first)) == (flaw.count, flaw.place, str(flaw.first))
            mine.first = flaw.first  # errors compare by identity
        assert back == tally
        assert len(back.flaws) == len(KINDS) + 1

    def test_places_go_on_over_shares(self) -> None:
        def share(name: str, read: int, place: int) -> Tally:
            made = Tally(seen=Seen(read=read), items=1)
            made.add_flaw(EmptyError(name, "is empty", expected="text", fix="mend"), place)
            made.add_field("log", name, present=name != "first")
            return made

        tally = share("first", 4, 3)
        tally.add(share("second", 4, 0))
        tally.add(share("third", 2, 1))
        assert (tally.seen.read, tally.items) == (10, 3)
        assert (tally.flaws["empty"].count, tally.flaws["empty"].place) == (3, 3)
        assert tally.fields == {"log": ("second", "first")}
        late = Tally(seen=Seen(read=5))
        late.add(share("second", 4, 2))
        assert late.flaws["empty"].place == 7
