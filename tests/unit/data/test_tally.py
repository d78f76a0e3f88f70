"""Counts over records: prompts that are cut, groups that are doubtful, fields that some have; also over shards."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from exo_megatron.config.losses import LossSpec
from exo_megatron.data.candidates import Candidate, CandidateRecord, write_candidates
from exo_megatron.data.dataset import load_groups
from exo_megatron.data.reading import Seen
from exo_megatron.data.tally import ERRORS, Tally
from exo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from exo_megatron.errors import DataError, EmptyError, OverlongPrompt
from tests.unit.data.loader import BAD, DULL, GOOD, LIMITS, LONG, Loader, Row, names, pair, rewarded
from tests.unit.data.tokenizers_made_here import CHAT_TEMPLATE


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
        assert len(back.flaws) == len(ERRORS) == 7

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
