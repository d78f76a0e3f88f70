"""Messages and columns of records: kept from the prompts to the reward source, and nothing else changes by them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exo_megatron.config.sections import DataConfig
from exo_megatron.data.candidates import Candidate, CandidateRecord, other_columns, write_candidates
from exo_megatron.data.completions import transcript
from exo_megatron.data.dataset import load_groups, load_prompts
from exo_megatron.data.groups import data_digest
from exo_megatron.data.text import Chat
from exo_megatron.data.tokenizer import Tokenizer
from exo_megatron.errors import DataError
from exo_megatron.rollout.engine import GeneratedCandidate, GeneratedGroup
from exo_megatron.rollout.generate import generate_records
from tests.reference.candidates import read_candidates

CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"}]
COLUMNS = {
    "answer": 2,
    "nested": {"a": [1, None, {"b": "schön \u2028"}]},
    # Names of fields of ours, which must neither be read as them nor hide them.
    "candidates": "so many",
    "rewards": "none",
    "columns": {"x": 1},
    "prompt_messages": "m",
    "prompt_tools": "t",
    "chat": [],
    "tools": {"a": 1},
    "logprob_source": 3,
    "completions": ["c"],
}
RECORD = CandidateRecord(
    "a",
    "text",
    (1, 5),
    (Candidate(" x", (7, 2), True),) * 2,
    (0.0, 1.0),
    chat=Chat(tuple(CHAT), ({"name": "add"},)),
    columns=COLUMNS,
)


def write(path: Path, *rows: dict[str, Any]) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(path))


class Alone:
    """A world of one process."""

    is_main = True

    def gather_items(self, items: list[Any]) -> list[Any]:
        return items


class Topology:
    """A model on one rank."""

    data_size, data_rank, tensor_rank, is_first_stage = 1, 0, 0, True


def draw(prompts: list[Any], tokenizer: Tokenizer) -> list[CandidateRecord]:
    """What `rollout` makes of prompts when an engine gives one candidate for each."""

    class Engine:
        def generate(self, prompts: Any, sampling: Any, *, seed: int, progress: Any) -> list[GeneratedGroup]:
            return [GeneratedGroup(p.id, (GeneratedCandidate((9, 2), True, -1.0),)) for p in prompts]

    class Policy:
        topology, text_tokenizer = Topology(), tokenizer

    class Sampling:
        candidates = 1

    given: Any = (Engine(), prompts, Sampling(), Policy())
    runtime: Any = Alone()
    return generate_records(*given, seed=0, runtime=runtime) or []


def test_prompts_keep_messages_and_columns_through_a_rollout_and_its_file(tmp_path: Path, chat: Tokenizer) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "m", "prompt": CHAT, "answer": 2, "source": None},
        {"id": "t", "prompt": "1+2=", "answer": 3, **{name: COLUMNS[name] for name in ("rewards", "columns")}},
        {"id": "n", "prompt": "1+3="},
    ]
    prompts = load_prompts(write(tmp_path / "data.jsonl", *rows), chat)
    expected: list[tuple[Any, dict[str, Any]]] = [
        (Chat(tuple(CHAT)), {"answer": 2}),
        (None, {"answer": 3, "rewards": "none", "columns": {"x": 1}}),
        (None, {}),
    ]
    assert [(prompt.chat, prompt.columns) for prompt in prompts] == expected
    drawn = draw(prompts, chat)
    assert [(record.chat, record.columns) for record in drawn] == expected
    write_candidates(tmp_path / "candidates.jsonl", drawn)
    assert read_candidates(tmp_path) == drawn
    again = load_prompts(DataConfig(path=str(tmp_path)), chat)  # prompts of a rollout
    assert [(prompt.chat, prompt.columns) for prompt in again] == expected
    stored = [json.loads(line) for line in (tmp_path / "candidates.jsonl").read_text().splitlines()]
    ours = ["id", "prompt", "prompt_ids", "candidates"]
    assert [list(each) for each in stored] == [[*ours, "columns", "prompt_messages"], [*ours, "columns"], ours]


def test_round_trip_with_columns_that_are_called_as_our_fields(tmp_path: Path) -> None:
    write_candidates(tmp_path / "candidates.jsonl", [RECORD])
    assert read_candidates(tmp_path) == [RECORD]


def test_columns_that_a_user_adds_to_a_file(tmp_path: Path) -> None:
    write_candidates(tmp_path / "candidates.jsonl", [RECORD])
    stored = json.loads((tmp_path / "candidates.jsonl").read_text())
    write(tmp_path / "candidates.jsonl", stored | {"difficulty": 5})
    assert read_candidates(tmp_path)[0].columns == COLUMNS | {"difficulty": 5}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"answer": 3}, "has the column 'answer' twice"),
        ({"columns": [1]}, "'columns' is [1]"),
        ({"prompt_messages": "text"}, "'prompt_messages' is 'text'"),
        ({"prompt_messages": [{"role": 1}]}, "'prompt_messages[0]' is"),
        ({"prompt_tools": "add"}, "'tools' is 'add'"),
    ],
)
def test_stored_context_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    write_candidates(tmp_path / "candidates.jsonl", [RECORD])
    stored = json.loads((tmp_path / "candidates.jsonl").read_text())
    write(tmp_path / "candidates.jsonl", stored | change)
    with pytest.raises(DataError) as caught:
        read_candidates(tmp_path)
    assert caught.value.problem.startswith(problem)


def test_digests_of_training_data_do_not_depend_on_them(tmp_path: Path, chat: Tokenizer) -> None:
    digests = set()
    for record in (RECORD, replace(RECORD, chat=None, columns={})):
        write_candidates(tmp_path / "candidates.jsonl", [record])
        digests.add(data_digest(load_groups(DataConfig(path=str(tmp_path)), chat, purpose="rewards")))
    assert len(digests) == 1


@pytest.mark.parametrize("value", [math.nan, [1.0, math.inf], b"bytes", {1, 2}, "\ud800", {"a": object()}])
def test_values_that_no_json_file_can_hold_are_left_out(value: object) -> None:
    assert other_columns({"id": "a", "prompt": "p", "bad": value, "good": (1, 2)}, ("id", "prompt")) == {"good": [1, 2]}


def test_transcript_says_everything() -> None:
    call: Any = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    assert transcript([*CHAT, call]) == 'system: s\n\nuser: 1+1?\n\nassistant: {"tool_calls": [{"name": "add"}]}'
