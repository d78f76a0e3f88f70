"""Every layout of docs/data.md against HF's own tokenizer and template, and what is refused rather than guessed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from exo_megatron.config.losses import LOSSES
from exo_megatron.config.sections import DataConfig
from exo_megatron.data.dataset import load_groups, load_prompts
from exo_megatron.data.groups import Group
from exo_megatron.data.reading import Interpreter, Seen
from exo_megatron.data.record_layouts import Use
from exo_megatron.data.records import SourceRecord
from exo_megatron.data.scorable import join_surveys, read_shares, survey
from exo_megatron.data.sources import open_source
from exo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from exo_megatron.errors import ConfigError, DataError, TieError
from tests.unit.data.tokenizers_made_here import hf_directory

DOCUMENT = Path(__file__).parents[3] / "docs" / "data.md"
EXAMPLE = re.compile(
    r"^\*\*([^*\n]+)\*\*, `([^`\n]+)`(?:, `([^`\n]+)`)?(?: \(as in [^\n]+\))?\n\n```json\n(.*?)```", re.M | re.S
)

Record = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """Records in our own fields, and a line that says what they were taken for."""

    records: list[SourceRecord]
    description: str


def read_source(config: DataConfig, use: Use) -> Reading:
    """The records of a source in our own fields."""
    interpreter, source, seen = Interpreter.of(config, use), open_source(config.path), Seen()
    try:
        records = [each for record in source.read() for each in interpreter.convert(record, seen)]
    finally:
        interpreter.check_columns(source.name, seen)
    return Reading(records, interpreter.describe(source.name, source.format, seen))


Whole = str | list[dict[str, str]]


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def alpaca(r: Record) -> str:
    """As in the column "text" of tatsu-lab/alpaca."""
    if r["input"]:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            f"Write a response that appropriately completes the request.\n\n### Instruction:\n{r['instruction']}"
            f"\n\n### Input:\n{r['input']}\n\n### Response:\n{r['output']}"
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{r['instruction']}\n\n### Response:\n{r['output']}"
    )


def dialogue(transcript: str) -> list[dict[str, str]]:
    _, human, answer = re.split(r"\n\n(?:Human|Assistant): ", transcript)
    return [says("user", human), says("assistant", answer)]


def post(r: Record, best: int) -> str:
    return f"SUBREDDIT: r/AskReddit\n\nTITLE: T\n\nPOST: {r['info']['post']}\n\nTL;DR:" + r["summaries"][best]["text"]


WHOLE: dict[str, Callable[[Record], list[Whole]]] = {
    "Pair, prompt apart": lambda r: [r["prompt"] + r["chosen"], r["prompt"] + r["rejected"]],
    "Pair, messages": lambda r: [r["prompt"] + r["chosen"], r["prompt"] + r["rejected"]],
    "Pair of whole conversations": lambda r: [r["chosen"], r["rejected"]],
    "Pair of conversations beside the prompt's text": lambda r: [r["chosen"], r["rejected"]],
    "The same for sft": lambda r: [r["messages"]],
    "Named columns": lambda r: [r["instruction"] + r["chosen_response"], r["instruction"] + r["rejected_response"]],
    "Transcripts": lambda r: [r["chosen"], r["rejected"]],
    "Transcripts as messages": lambda r: [dialogue(r["chosen"]), dialogue(r["rejected"])],
    "Question with a pair": lambda r: [
        ([says("system", r["system"])] if r["system"] else [])
        + [says("user", r["question"]), says("assistant", r[name])]
        for name in ("chosen", "rejected")
    ],
    "Conversation with a pair": lambda r: [
        [says("user", r["conversations"][0]["value"]), says("assistant", r[name]["value"])]
        for name in ("chosen", "rejected")
    ],
    "Several rejected answers": lambda r: [r["prompt"] + answer for answer in (r["chosen"], *r["rejected"])],
    "Several rejected conversations": lambda r: [r["chosen"], *r["rejected"]],
    "Ranked answers": lambda r: [r["prompt"] + r["answers"][k]["answer"] for k in (1, 0, 2)],
    "Compared summaries": lambda r: [post(r, r["choice"]), post(r, 1 - r["choice"])],
    "Compared comments": lambda r: [
        r["history"] + r[f"human_ref_{which}"] for which in ("AB" if r["labels"] == 1 else "BA")
    ],
    "Rewarded completions": lambda r: [r["prompt"] + answer for answer in r["completions"]],
    "Rewarded messages": lambda r: [r["prompt"] + answer for answer in r["completions"]],
    "Rewarded whole conversations": lambda r: r["completions"],
    "Scored responses": lambda r: [r["prompt"] + answer for answer in r["responses"]],
    "Completions to score": lambda r: r["completions"],
    "Prompt and completion": lambda r: [r["prompt"] + r["completion"]],
    "Prompt and completion, messages": lambda r: [r["prompt"] + r["completion"]],
    "Prompt and chosen answer": lambda r: [r["prompt"] + r["chosen"]],
    "Messages": lambda r: [r["messages"]],
    "Messages, every answer": lambda r: [r["messages"][:2], r["messages"]],
    "ShareGPT": lambda r: [
        [
            says({"system": "system", "human": "user", "gpt": "assistant"}[m["from"]], m["value"])
            for m in r["conversations"]
        ]
    ],
    "Text": lambda r: [r["text"]],
    "Alpaca": lambda r: [alpaca(r)],
    "Alpaca as messages": lambda r: [
        [
            says("user", r["instruction"] + ("\n\n" + r["input"] if r["input"] else "")),
            says("assistant", r["output"]),
        ]
    ],
    "Prompts": lambda r: [r["prompt"]],
    "Prompts, messages": lambda r: [r["prompt"]],
    "Prompts of whole conversations": lambda r: [r["messages"][:3]],
}
"""The whole conversations of a record, by the name of the example: what HF gets."""

EXAMPLES = {name: (stage, settings, body) for name, stage, settings, body in EXAMPLE.findall(DOCUMENT.read_text())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_directory(tmp_path_factory.mktemp("layouts"), "bytes")


@pytest.fixture(scope="module")
def hf(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., DataConfig]:
    def write(*rows: Record, **settings: Any) -> DataConfig:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return DataConfig(path=str(path), **settings)

    return write


def whole_ids(hf: PreTrainedTokenizerBase, whole: Whole, *, generation: bool = False) -> list[int]:
    """HF's ids of a text, or of a conversation up to the end of its last turn."""
    if isinstance(whole, str):
        return hf.encode(whole) + ([] if generation else [hf.eos_token_id])
    ids = hf.encode(
        hf.apply_chat_template(whole, tokenize=False, add_generation_prompt=generation), add_special_tokens=False
    )
    return ids if generation else ids[: len(ids) - ids[::-1].index(hf.eos_token_id)]


def test_the_table_is_whole() -> None:
    assert EXAMPLES.keys() == WHOLE.keys()
    assert len(EXAMPLES) >= 25
    assert all(body.count("\n") == 3 for _, _, body in EXAMPLES.values())


@pytest.mark.parametrize("name", [name for name, (stage, _, _) in EXAMPLES.items() if stage != "score"])
def test_ids_are_those_of_the_whole_conversation(
    name: str, config: Callable[..., DataConfig], hf: PreTrainedTokenizerBase, tokenizer: Tokenizer
) -> None:
    stage, settings, body = EXAMPLES[name]
    rows = [json.loads(line) for line in body.splitlines()]
    key, _, value = settings.removeprefix("data.").partition("=")
    data = config(*rows, **({key: yaml.safe_load(value)} if settings else {}))
    wholes = [WHOLE[name](row) for row in rows]
    if stage == "rollout":
        found = [list(prompt.ids) for prompt in load_prompts(data, tokenizer)]
        assert found == [whole_ids(hf, whole, generation=True) for (whole,) in wholes]
        return
    kind = stage.removeprefix("align, ")
    groups = load_groups(
        data,
        tokenizer,
        purpose="sft" if stage == "sft" else LOSSES[kind].compares,
        loss=None if stage == "sft" else LOSSES[kind],
    )
    found = [[*group.prompt, *candidate] for group in groups for candidate in group.candidates]
    assert found == [whole_ids(hf, each) for whole in wholes for each in whole]
    if stage != "sft":
        assert [len(group.candidates) for group in groups] == [len(whole) for whole in wholes]
    rewards = {"completions": "rewards", "responses": "scores"}
    expected = [tuple(map(float, row[rewards[key]])) for row in rows for key in rewards if rewards[key] in row]
    assert [group.rewards for group in groups if group.rewards is not None] == expected


def test_completions_to_score(config: Callable[..., DataConfig]) -> None:
    rows = [json.loads(line) for line in EXAMPLES["Completions to score"][2].splitlines()]
    interpreter = Interpreter("score")
    (share,) = read_shares(Path(config(*rows).path), interpreter, lambda number: True)
    assert [list(record.texts) for record in share.records] == [row["completions"] for row in rows]
    contents = join_surveys([survey(share)])
    description = interpreter.describe("mine.jsonl", contents.format, contents.tally.seen)
    assert description == "mine.jsonl: JSON, 3 records: 3 as completions (completions, prompt)"


def test_what_a_file_was_taken_for_is_told(config: Callable[..., DataConfig], tokenizer: Tokenizer) -> None:
    rows = [json.loads(line) for line in EXAMPLES["Pair of conversations beside the prompt's text"][2].splitlines()]
    told: list[str] = []
    data = config(*rows)
    load_groups(data, tokenizer, purpose="preference", tell=told.append)
    assert told == [
        f"data: {data.path}: JSON, 3 records: 3 as preference pair (chosen, prompt, rejected); "
        "other columns: messages, prompt_id, score_chosen",
        r"data: the first is '<|user|>2+2?</s>\n<|assistant|>' with '4</s>' and '5</s>'",
    ]
    named = config({"question": "x", "a": "y"}, columns={"prompt": "question", "chosen": "a"})
    assert (
        "1 record: 1 as prompt and chosen answer (chosen=a, prompt=question)" in read_source(named, "sft").description
    )


Q, A, B = says("user", "q"), says("assistant", "a"), says("assistant", "b")


class TestPrompts:
    """Where a conversation parts."""

    @pytest.mark.parametrize(
        ("chosen", "rejected", "turns"),
        [
            ([Q, A, Q, A], [Q, A, Q, B], 3),
            ([Q, A], [Q, B, Q, A], 1),
            ([Q, A], [Q, A, Q, B], 1),
            ([Q, A, Q, A], [Q, A, Q, A], 3),
        ],
    )
    def test_of_messages(self, config: Any, chosen: Any, rejected: Any, turns: int) -> None:
        (record,) = read_source(config({"chosen": chosen, "rejected": rejected}), "preference").records
        assert record.fields["prompt"] == chosen[:turns]
        assert record.fields["prompt"] + record.fields["chosen"] == chosen
        assert record.fields["prompt"] + record.fields["rejected"] == rejected

    def test_of_transcripts_is_never_inside_a_word(self, config: Any) -> None:
        row = {"chosen": "\n\nHuman: q\n\nAssistant: a good word", "rejected": "\n\nHuman: q\n\nAssistant: a god"}
        (record,) = read_source(config(row), "preference").records
        assert record.fields["prompt"] == "\n\nHuman: q\n\nAssistant:"
        assert (record.fields["chosen"], record.fields["rejected"]) == (" a good word", " a god")

    @pytest.mark.parametrize("end", ["", "\n\nAssistant:"])
    def test_repeated_by_transcripts(self, config: Any, end: str) -> None:
        before = "\n\nHuman: q" + end
        row = {"prompt": before, "chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
        (record,) = read_source(config(row), "preference").records
        assert record.fields["prompt"] == "\n\nHuman: q\n\nAssistant:" and record.fields["rejected"] == " b"

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            ({"chosen": [Q, A], "rejected": [says("user", "p"), B]}, "have no turn in common"),
            (
                {"chosen": [Q, A, Q, A], "rejected": [Q, A, says("user", "p"), B]},
                "part at turn 3, which is of the user",
            ),
            (
                {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: a"},
                "no turn in common",
            ),
            (
                {"chosen": "Human: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
                "no turn in common",
            ),
            (
                {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: q", "rejected": "\n\nHuman: q\n\nAssistant: b"},
                "'chosen' goes on for 2 turns after the common prompt",
            ),
            ({"chosen": "a", "rejected": [Q, A]}, "'chosen' is 'a'; expected a whole conversation"),
            (
                {"prompt": "p", "chosen": [Q, A], "rejected": [Q, B]},
                "'prompt' is a string that is no message of the user",
            ),
            ({"prompt": "p", "system": "s", "chosen": "a", "rejected": "b"}, "has text in 'system'"),
            ({"conversations": [{"from": "tool", "value": "x"}], "chosen": "a", "rejected": "b"}, "is 'tool'"),
        ],
    )
    def test_that_cannot_be_told(self, config: Any, tokenizer: Tokenizer, row: Record, problem: str) -> None:
        with pytest.raises(DataError) as error:
            load_groups(config(row), tokenizer, purpose="preference")
        assert problem in str(error.value) and str(error.value).split(": ")[0].endswith("data.jsonl:1")


class TestRefused:
    """Never guessed, never dropped."""

    @pytest.mark.parametrize(
        ("use", "row", "problem"),
        [
            ("sft", {"prompt": "p", "completion": "c", "label": True}, "unpaired preference data (KTO)"),
            ("preference", {"prompt": "p", "completion": "c", "label": False}, "unpaired preference data (KTO)"),
            ("score", {"prompt": "p", "completions": ["c"], "labels": [True]}, "stepwise supervision"),
            ("sft", {"message_id": "1", "parent_id": None, "role": "prompter", "text": "t"}, "a tree (OpenAssistant)"),
            ("sft", {"message_id": "1", "parent_id": "0", "role": "prompter", "text": "t"}, "a tree (OpenAssistant)"),
            ("sft", {"prompt": "p", "completion": "c", "text": "t"}, "can be read as prompt and completion (prompt"),
            ("sft", {"prompt": "p", "chosen": "c", "completion": "d"}, "or as prompt and completion"),
            (
                "prompts",
                {"prompt": "p", "messages": [Q, A]},
                "can be read as messages (messages) or as prompt (prompt)",
            ),
            ("preference", {"messages": [Q, A]}, "is messages (messages), which align with loss.kind exo_pref"),
            (
                "rewards",
                {"prompt": "p", "chosen": "c", "rejected": "d"},
                "is preference pair (prompt, chosen, rejected)",
            ),
            ("sft", {"prompt": "p", "completions": ["c"], "rewards": [1]}, "which sft cannot use"),
            ("sft", {"question": "q", "answer": "a"}, "has no field 'prompt' (fields: answer, question)"),
            ("sft", {"messages": [A]}, "is a conversation of assistant"),
            ("sft", {"messages": [Q, A, Q]}, "is a conversation of user, assistant, user"),
            ("preference", {"prompt": "p", "chosen": "c", "rejected": []}, "at least one answer"),
            (
                "preference",
                {"prompt": "p", "answers": [{"answer": "a", "rank": 1}] * 2},
                "one answer with the best rank",
            ),
        ],
    )
    def test_columns(self, config: Any, use: Any, row: Record, problem: str) -> None:
        with pytest.raises(DataError) as error:
            read_source(config(row), use)
        assert problem in str(error.value), error.value

    def test_settings(self, config: Any) -> None:
        row = {"question": "q", "prompt": "p", "a": "a", "chosen": "c"}
        data = config(row, columns={"prompt": "question", "chosen": "a"})
        (record,) = read_source(data, "sft").records
        assert (record.fields["prompt"], record.fields["chosen"]) == ("q", "a"), "only the named columns are read"
        for columns, problem in (
            ({"prompt": "frage"}, "data.columns.prompt: got 'frage', which is no column of"),
            ({"anfrage": "question"}, "data.columns.anfrage: is no column that a layout has"),
        ):
            with pytest.raises(ConfigError) as error:
                read_source(config(row, columns=columns), "sft")
            assert problem in str(error.value)
        with pytest.raises(ConfigError, match=r"data\.train_on: got 'all'"):
            read_source(config({"prompt": "p", "chosen": "c"}, train_on="all"), "sft")

    def test_columns_in_two_meanings_that_agree(self, config: Any) -> None:
        row = {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "messages": [Q, A]}
        assert read_source(config(row), "prompts").records[0].fields["prompt"] == [Q]
        with pytest.raises(DataError, match="can be read as"):
            read_source(config({**row, "messages": [Q, B]}), "sft")
        one = config({**row, "messages": [Q, B]}, columns={"messages": "messages"})
        assert read_source(one, "sft").records[0].fields["chosen"] == [B]

    def test_weights_of_answers(self, config: Any) -> None:
        silent = {**A, "weight": 0}
        (record,) = read_source(config({"messages": [Q, silent, Q, B]}, train_on="all"), "sft").records
        assert (record.fields["prompt"], record.fields["chosen"]) == ([Q, A, Q], [B])
        with pytest.raises(DataError, match="'weight' is 0"):
            read_source(config({"messages": [Q, B, Q, silent]}), "sft")


class TestSeveralRejected:
    ROW: ClassVar[Record] = {"prompt": "p", "chosen": "a", "rejected": ["b", "c", "d"]}

    def load(self, config: Any, tokenizer: Tokenizer, kind: str, row: Record, **settings: Any) -> list[Group]:
        return load_groups(config(row), tokenizer, purpose="preference", loss=LOSSES[kind], **settings)

    def test_none_is_dropped(self, config: Any, tokenizer: Tokenizer) -> None:
        for kind in ("exo_pref", "dpo_pref"):
            (group,) = self.load(config, tokenizer, kind, self.ROW)
            assert [tokenizer.decode_completion(y) for y in group.candidates] == ["a", "b", "c", "d"]
        with pytest.raises(DataError, match=r"has 3 rejected answers.*exo_pref or dpo_pref"):
            self.load(config, tokenizer, "ipo_pref", self.ROW)
        with pytest.raises(DataError, match="has 4 answers, and candidates is 2"):
            self.load(config, tokenizer, "exo_pref", self.ROW, candidates=2)
        with pytest.raises(TieError, match="the same text"):
            self.load(config, tokenizer, "exo_pref", {**self.ROW, "rejected": ["b", "a"]})
        (pair,) = self.load(config, tokenizer, "ipo_pref", {**self.ROW, "rejected": ["b"]})
        assert len(pair.candidates) == 2
