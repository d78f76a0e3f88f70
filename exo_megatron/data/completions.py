"""Candidates that did not come from `rollout`: texts or messages under `prompt` and `completions`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from exo_megatron.data.candidates import (
    CandidateRecord,
    Columns,
    chat_prompt,
    other_columns,
    parse_candidate_record,
    stored_candidates,
)
from exo_megatron.data.records import SourceRecord
from exo_megatron.data.text import Answer, Chat, Message, Text, completion_texts, prompt_text

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


def column_names(records: Iterable[ScorableRecord]) -> list[str]:
    """List the columns that any of the records has, in order of appearance."""
    return list(dict.fromkeys(name for record in records for name in record.columns))


def stored_record(record: ScorableRecord) -> dict[str, Any]:
    """Convert a record to the JSON values that are stored, in the format in which it was read.

    Raises ValueError for rewards that are not finite.
    """
    return stored_candidates(record) if isinstance(record, CandidateRecord) else _stored(record)


def parse_scorable(record: SourceRecord) -> ScorableRecord:
    """Check a record in our own fields and convert it to its types.

    Raises DataError with the record's place.
    """
    if "candidates" in record.fields:
        return parse_candidate_record(record)
    prompt = prompt_text(record.where, record.fields)
    completions = completion_texts(record.where, record.fields, "completions", prompt=prompt)
    columns = other_columns(record.fields, _OWN_FIELDS)
    return CompletionsRecord(record.id, prompt, tuple(completions), columns=columns)


def _stored(record: CompletionsRecord) -> dict[str, Any]:
    chat = record.chat
    stored: dict[str, Any] = {"id": record.id, "prompt": record.prompt if chat is None else chat.messages}
    stored |= {"completions": record.completions, "rewards": record.rewards}
    return stored | ({"tools": chat.tools} if chat is not None and chat.tools else {}) | dict(record.columns)


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
