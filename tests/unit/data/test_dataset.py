"""Prompts and groups from every format, and the refusal of every record that cannot be trained on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import exo_megatron
from exo_megatron.config.losses import LossSpec
from exo_megatron.config.sections import DataConfig
from exo_megatron.data.candidates import Candidate, CandidateRecord, write_candidates
from exo_megatron.data.dataset import load_groups, load_prompts
from exo_megatron.data.group_builder import Purpose
from exo_megatron.data.groups import Group
from exo_megatron.data.loss_fields import TOKEN_LOGPROBS
from exo_megatron.data.text import Chat
from exo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from exo_megatron.errors import DataError
from tests.reference.tiny_llama import tiny_tokenizer

GOOD, BAD, DULL = " was good .", " was bad .", " is not so dull ."
PAIR = {"id": "p", "prompt": "The movie", "chosen": GOOD, "rejected": BAD}
REWARDED = {"id": "r", "prompt": "The movie", "completions": [GOOD, BAD, DULL], "rewards": [0.5, -1, 2]}


def ids_of(tokenizer: Tokenizer, completion: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode_completion(completion, prompt="x"))


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


def config(file: Path, *rows: dict[str, Any], **settings: Any) -> DataConfig:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataConfig(path=str(file), **settings)


def groups(
    file: Path, tokenizer: Tokenizer, purpose: Purpose, *rows: dict[str, Any], k: int | None = None, **settings: Any
) -> list[Group]:
    return load_groups(config(file, *rows, **settings), tokenizer, purpose=purpose, candidates=k)


def refused(
    file: Path, tokenizer: Tokenizer, purpose: Purpose, row: dict[str, Any], k: int | None = None, **settings: Any
) -> str:
    """The message for a bad record on line 2, behind a good one."""
    good = {"sft": PAIR, "preference": PAIR, "rewards": {**REWARDED, "id": "ok"}}[purpose]
    good = good if k is None or purpose != "rewards" else {**good, "completions": [GOOD] * k, "rewards": [0] * k}
    with pytest.raises(DataError) as error:
        groups(file, tokenizer, purpose, good, row, k=k, **settings)
    message = str(error.value)
    assert message.startswith(f"{file}:2"), message
    assert "\n" not in message
    return message


class TestPrompts:
    def test_text_and_ids(self, file: Path, spm: Tokenizer) -> None:
        prompts = load_prompts(config(file, {"prompt": "The movie"}, {"id": 5, "prompt": "It", "label": 1}), spm)
        assert [(p.id, p.text) for p in prompts] == [("line-1", "The movie"), ("5", "It")]
        assert prompts[0].ids == tuple(spm.encode_prompt("The movie"))

    def test_chat_messages_are_rendered(self, file: Path, chat: Tokenizer) -> None:
        (prompt,) = load_prompts(config(file, {"prompt": [user("The movie?")]}), chat)
        assert prompt.text == "<|user|>The movie?</s>\n<|assistant|>"
        assert prompt.ids == tuple(chat.encode_prompt(Chat((user("The movie?"),))))

    def test_prompts_of_a_candidates_file_keep_their_ids(self, tmp_path: Path, spm: Tokenizer) -> None:
        record = CandidateRecord("a", "The movie", (1, 9, 9), (Candidate("", (2,), True, 0.0),))
        write_candidates(tmp_path / "candidates.jsonl", [record])
        (prompt,) = load_prompts(DataConfig(path=str(tmp_path)), spm)
        assert (prompt.id, prompt.text, prompt.ids) == ("a", "The movie", (1, 9, 9))

    def test_limit(self, file: Path, spm: Tokenizer) -> None:
        rows = [{"prompt": "It"}, {"prompt": "The movie"}, {"nothing": 1}]
        assert len(load_prompts(config(file, *rows, limit=2), spm)) == 2

    def test_too_long(self, file: Path, spm: Tokenizer) -> None:
        length = len(spm.encode_prompt("The movie was good ."))
        row = {"id": "long-one", "prompt": "The movie was good ."}
        assert load_prompts(config(file, row, max_prompt_tokens=length), spm)
        with pytest.raises(DataError) as error:
            load_prompts(config(file, row, max_prompt_tokens=length - 1), spm)
        for part in (f"{file}:1", "'long-one'", f"{length} tokens", f"at most {length - 1}", "data.max_prompt_tokens"):
            assert part in str(error.value)

    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"Prompt": "x", "text": "y"}, "rename 'Prompt' to 'prompt'"),
            ({"question": "x"}, "no field 'prompt' (fields: question)"),
            ({"prompt": 3}, "'prompt' is 3; expected a string or a non-empty list of chat messages"),
            ({"prompt": []}, "non-empty list of chat messages"),
            ({"prompt": "\ud83d"}, "unpaired surrogate"),
            ({"prompt": [user("\udc00")]}, "'prompt[0]' has an unpaired surrogate"),
            ({"prompt": ["x"]}, "'prompt[0]' is 'x'; expected a message"),
            ({"prompt": [{"role": "user"}]}, "'prompt[0]' is {'role': 'user'}; expected a message"),
            ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "expected a message"),
            ({"prompt": [user("x"), assistant("y")]}, "ends with a message of the assistant"),
            ({"prompt": [{"role": "critic", "content": "x"}]}, "unknown role critic"),
        ],
    )
    def test_bad_prompts(self, file: Path, chat: Tokenizer, row: dict[str, Any], expected: str) -> None:
        with pytest.raises(DataError) as error:
            load_prompts(config(file, row), chat)
        assert str(error.value).startswith(f"{file}:1") and expected in str(error.value)

    def test_messages_for_a_tokenizer_without_template(self, file: Path, spm: Tokenizer) -> None:
        with pytest.raises(DataError, match=r"data\.jsonl:1: .*no chat template"):
            load_prompts(config(file, {"prompt": [user("x")]}), spm)


class TestSft:
    def test_the_chosen_completion_is_the_one_candidate(self, file: Path, spm: Tokenizer) -> None:
        plain = {"prompt": "It", "chosen": GOOD}
        first, second = groups(file, spm, "sft", PAIR, plain)
        assert first == Group("p", tuple(spm.encode_prompt("The movie")), (ids_of(spm, GOOD),))
        assert first.candidates[0][-1] == spm.eos_id
        assert second.id == "line-2"

    def test_chat(self, file: Path, chat: Tokenizer) -> None:
        (group,) = groups(file, chat, "sft", {"prompt": [user("Well?")], "chosen": [assistant("good")]})
        assert chat.decode([*group.prompt, *group.candidates[0]]) == "Well?\ngood"
        assert group.candidates[0][-1] == chat.eos_id

    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"prompt": "x", "chose": "y"}, "rename 'chose' to 'chosen'"),
            ({"prompt": "x", "chosen": ""}, "'chosen' is an empty completion"),
            ({"prompt": "x", "chosen": " \n"}, "'chosen' is an empty completion"),
            ({"prompt": "x", "chosen": 1}, "'chosen' is 1"),
            (
                {"prompt": "x", "chosen": [user("y"), assistant("z")]},
                "a string that is no message of the user",
            ),
            ({"prompt": [user("x")], "chosen": "y"}, "'prompt' is a list of messages, 'chosen' is a string"),
            ({"prompt": [user("x")], "chosen": [assistant(" ")]}, "'chosen' is an empty completion"),
            ({"prompt": [user("x")], "chosen": [user("y")]}, "the first and the last are the assistant's"),
            ({"prompt": [user("x")], "chosen": [user("w"), assistant("y")]}, "messages of user, assistant"),
            ({"chosen": "y"}, "no field 'prompt'"),
        ],
    )
    def test_bad_records(self, file: Path, chat: Tokenizer, row: dict[str, Any], expected: str) -> None:
        assert expected in refused(file, chat, "sft", row)

    def test_completion_too_long(self, file: Path, spm: Tokenizer) -> None:
        length = len(ids_of(spm, DULL))
        row = {"id": "x1", "prompt": "It", "chosen": DULL}
        assert groups(file, spm, "sft", row, max_completion_tokens=length)
        with pytest.raises(DataError) as error:
            groups(file, spm, "sft", row, max_completion_tokens=length - 1)
        for part in (":1", "'x1'", f"{length} tokens", f"at most {length - 1}", "data.max_completion_tokens"):
            assert part in str(error.value)


class TestPreference:
    def test_pairs(self, file: Path, spm: Tokenizer) -> None:
        (group,) = groups(file, spm, "preference", PAIR, k=2)
        assert group.candidates == (
            ids_of(spm, GOOD),
            ids_of(spm, BAD),
        )
        assert group.rewards is None

    def test_errors(self, file: Path, spm: Tokenizer) -> None:
        tie = {**REWARDED, "rewards": [1, 1, 2]}
        assert "the first two candidates of record 'r' have reward 1.0" in refused(file, spm, "preference", tie)
        assert "the same text" in refused(file, spm, "preference", {**PAIR, "id": "q", "rejected": GOOD})
        same = {**REWARDED, "completions": [GOOD, GOOD], "rewards": [0, 1]}
        assert "the same text" in refused(file, spm, "preference", same)
        assert "rename 'reject' to 'rejected'" in refused(
            file, spm, "preference", {"prompt": "x", "chosen": "y", "reject": "z"}
        )

    @pytest.mark.parametrize("purpose", ["sft", "preference"])
    def test_whole_dialogues_are_not_guessed_apart(self, file: Path, spm: Tokenizer, purpose: Purpose) -> None:
        row = {"chosen": "User: a Bot: b", "rejected": "User: a Bot: c"}
        message = refused(file, spm, purpose, row)
        assert "whole dialogues" in message and "split them" in message and "Assistant:" in message


class TestRewards:
    def test_all_completions_with_their_rewards(self, file: Path, spm: Tokenizer) -> None:
        two = {"prompt": "It", "completions": [GOOD, BAD], "rewards": [3, 3.0]}
        first, second = groups(file, spm, "rewards", REWARDED, two)
        assert first.candidates == tuple(ids_of(spm, text) for text in (GOOD, BAD, DULL))
        assert first.rewards == (0.5, -1.0, 2.0)
        assert second.rewards == (3.0, 3.0), "equal rewards are legitimate"

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"rewards": [1, 2]}, "has 2 rewards for 3 completions"),
            ({"rewards": [1, math.nan, 2]}, "'rewards[1]' is nan; expected a finite number"),
            ({"rewards": [1, math.inf, 2]}, "'rewards[1]' is inf"),
            ({"rewards": [1, "2", 3]}, "'rewards[1]' is '2'"),
            (
                {"rewards": None},
                "is completions (prompt, completions), which align with loss.kind exo_rw",
            ),
            ({"completions": [GOOD], "rewards": [1]}, "has 1 candidate; expected at least 2"),
            ({"completions": []}, "'completions' is empty"),
            ({"completions": "abc"}, "expected a list of completions"),
            ({"completions": [GOOD, "", BAD]}, "'completions[1]' is an empty completion"),
        ],
    )
    def test_bad_records(self, file: Path, spm: Tokenizer, change: dict[str, Any], expected: str) -> None:
        assert expected in refused(file, spm, "rewards", {**REWARDED, **change})

    def test_number_of_candidates(self, file: Path, spm: Tokenizer) -> None:
        assert groups(file, spm, "rewards", REWARDED, k=3)
        message = refused(file, spm, "rewards", REWARDED, k=4)
        assert "record 'r' has 3 candidates; expected at least 4" in message

    def test_preference_pairs_are_not_rewards(self, file: Path, spm: Tokenizer) -> None:
        assert "exo_pref" in refused(file, spm, "rewards", PAIR)


class TestScoredCandidates:
    RECORD = CandidateRecord(
        id="a",
        prompt="The movie",
        prompt_ids=(1, 300, 301),
        candidates=(Candidate("x", (9, 9, 2), True, -1.0), Candidate("y", (8,), False, -2.0)),
        rewards=(0.0, 1.0),
    )

    def test_ids_are_used_as_they_are(self, tmp_path: Path, spm: Tokenizer) -> None:
        """Neither re-encoded from the text nor ended where generation stopped at the length limit."""
        write_candidates(tmp_path / "candidates.jsonl", [self.RECORD])
        (group,) = load_groups(DataConfig(path=str(tmp_path)), spm, purpose="rewards", candidates=2)
        assert group == Group("a", (1, 300, 301), ((9, 9, 2), (8,)), rewards=(0.0, 1.0))
        (pair,) = load_groups(DataConfig(path=str(tmp_path)), spm, purpose="preference")
        assert pair == Group("a", (1, 300, 301), ((8,), (9, 9, 2)), rewards=(1.0, 0.0))

    @pytest.mark.parametrize(
        ("changes", "settings", "expected"),
        [
            ({"rewards": None}, {}, "exo-megatron score"),
            ({"prompt_ids": (1, 10**6)}, {}, "token id 1000000; expected ids below"),
            ({}, {"max_prompt_tokens": 2}, "has 3 tokens; expected at most 2 (data.max_prompt_tokens"),
            ({}, {"max_completion_tokens": 2}, "'candidates[0]' of record 'a' has 3 tokens"),
        ],
    )
    def test_errors(
        self, tmp_path: Path, spm: Tokenizer, changes: dict[str, Any], settings: dict[str, int], expected: str
    ) -> None:
        path = tmp_path / "candidates.jsonl"
        write_candidates(path, [CandidateRecord(**{**self.RECORD.__dict__, **changes})])
        with pytest.raises(DataError) as error:
            load_groups(DataConfig(path=str(path), **settings), spm, purpose="rewards")
        assert str(error.value).startswith(f"{path}:1") and expected in str(error.value)


def test_a_special_token_that_the_model_lacks_is_refused_where_a_text_spells_it(file: Path, tmp_path: Path) -> None:
    """As in Gemma 3 1B, whose tokenizer has a token of images beyond the embedding."""
    words = tiny_tokenizer(20)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    words.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path).fitted_to(20)
    plain = {"id": "a", "prompt": "w3 w4", "chosen": "w5", "rejected": "w6"}
    assert len(groups(file, tokenizer, "preference", plain)) == 1
    with pytest.raises(DataError, match=r"'prompt' has token id 20.*ids below 20"):
        groups(file, tokenizer, "preference", plain | {"prompt": "w3 <image>"})


@pytest.mark.parametrize("name", TOKEN_LOGPROBS)
def test_logprobs_of_tokens_are_in_all_records_or_in_none(file: Path, spm: Tokenizer, name: str) -> None:
    """Otherwise whether the loss sees them would depend on the packing."""
    spec = LossSpec("", "rewards", (), token_logps=True)
    lengths = [len(candidate) for candidate in groups(file, spm, "rewards", REWARDED)[0].candidates]
    full, other, bare = ({**REWARDED, "id": number} for number in range(3))
    full[name] = other[name] = [[-1.0] * length for length in lengths]
    found = load_groups(config(file, full, other), spm, purpose="rewards", loss=spec)
    assert all(vars(group)[name] is not None for group in found)
    assert len(load_groups(config(file, REWARDED, bare), spm, purpose="rewards", loss=spec)) == 2
    with pytest.raises(DataError, match=rf":2: has no '{name}', but .*:1 has"):
        load_groups(config(file, full, bare, other), spm, purpose="rewards", loss=spec)


def test_reading_imports_no_heavy_library() -> None:
    """Bad data is told in a second, not after torch and transformers have been loaded."""
    code = (
        "import sys, exo_megatron.data.dataset, exo_megatron.data.candidates, exo_megatron.data.groups\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'megatron'} & set(sys.modules)))"
    )
    root = Path(exo_megatron.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "[]\n"
