"""Candidates that did not come from `rollout`: texts or messages under `prompt` and `completions`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from exo_megatron.data.candidates import (
    CandidateRecord,
    Columns,
    chat_prompt,
    other_columns,
    parse_candidate_record,
    write_candidates,
)
from exo_megatron.data.reading import read_layouts
from exo_megatron.data.records import SourceRecord
from exo_megatron.data.sources import open_source
from exo_megatron.data.text import Answer, Chat, Message, Text, completion_texts, prompt_text
from exo_megatron.errors import DataError
from exo_megatron.utils.files import write_jsonl

_OWN_FIELDS = ("id", "prompt", "completions", "rewards", "tools")


@dataclass(frozen=True)
class CompletionsRecord:
    """One prompt, its K >= 1 candidates and, once scored, their K rewards.

    Prompt and candidates are all strings or all chat messages. `columns` are the record's other
    fields, which are written back beside ours.
    """

    id: str
    prompt: Text
    completions: tuple[Answer, ...]
    rewards: tuple[float, ...] | None = None
    columns: Columns = field(default_factory=dict)

    @property
    def prompt_text(self) -> str:
        """The prompt that a reward source reads: messages as plain text."""
        return self.prompt if isinstance(self.prompt, str) else transcript_prompt(self.prompt.messages)

    @property
    def texts(self) -> tuple[str, ...]:
        """The K texts that a reward source reads: messages as plain text."""
        return tuple(text if isinstance(text, str) else transcript_answer(text) for text in self.completions)

    @property
    def chat(self) -> Chat | None:
        """The conversation that the candidates answer, None if the prompt is a string."""
        return chat_prompt(self.prompt)

    @property
    def answers(self) -> tuple[tuple[Message, ...], ...]:
        """The K candidates as messages that follow those of `chat`; empty if they are strings."""
        return tuple(() if isinstance(text, str) else text for text in self.completions)


ScorableRecord = CandidateRecord | CompletionsRecord


def read_scorable(path: Path, *, tell: Callable[[str], object] | None = None) -> list[ScorableRecord]:
    """Read the input of `score`, in one of two formats that the first record decides.

    The input is a rollout's output directory, a file of its records, or any data source whose layout
    has several completions. Rewards in it are dropped. `tell` gets a line that says what it was taken
    for. Raises DataError, which names file and line, for a malformed record.
    """
    if not path.exists():
        raise DataError(
            str(path), "does not exist", expected="output of `rollout`, or a file", fix="correct candidates"
        )
    source = open_source(str(path))
    reading = read_layouts(source, source.read(), "score")
    if tell is not None:
        tell(f"data: {reading.description}")
    records = reading.records
    if "completions" in records[0].fields:
        return [_parse(record) for record in records]
    return [parse_candidate_record(record) for record in records]


def write_scored(path: Path, records: Sequence[ScorableRecord]) -> None:
    """Write records to the file `path` atomically, in the format in which they were read."""
    candidates = [record for record in records if isinstance(record, CandidateRecord)]
    if candidates:
        write_candidates(path, candidates)
    else:
        write_jsonl(path, (_stored(record) for record in records if isinstance(record, CompletionsRecord)))


def _stored(record: CompletionsRecord) -> dict[str, object]:
    chat = record.chat
    stored: dict[str, object] = {"id": record.id, "prompt": record.prompt if chat is None else chat.messages}
    stored |= {"completions": record.completions, "rewards": record.rewards}
    return stored | ({"tools": chat.tools} if chat is not None and chat.tools else {}) | dict(record.columns)


def _parse(record: SourceRecord) -> CompletionsRecord:
    prompt = prompt_text(record.where, record.fields)
    completions = completion_texts(record.where, record.fields, "completions", prompt=prompt)
    columns = other_columns(record.fields, _OWN_FIELDS)
    return CompletionsRecord(record.id, prompt, tuple(completions), columns=columns)


def transcript(messages: Sequence[Message]) -> str:
    """Write messages as plain text: `role: content`, with a blank line between two of them."""
    return "\n\n".join(f"{message['role']}: {_said(message)}" for message in messages)


def transcript_prompt(messages: Sequence[Message]) -> str:
    """Write the messages of a prompt as plain text that the assistant's answer continues."""
    return f"{transcript(messages)}\n\nassistant: "


def transcript_answer(messages: Sequence[Message]) -> str:
    """Write the messages of a candidate as plain text that follows `transcript_prompt`."""
    return transcript(messages).removeprefix("assistant: ")


def _said(message: Message) -> str:
    """Return the content, and further fields of the message (such as tool calls) as JSON."""
    further = {name: value for name, value in message.items() if name not in ("role", "content")}
    parts = [message.get("content") or "", json.dumps(further, ensure_ascii=False) if further else ""]
    return "\n".join(part for part in parts if part)
