"""Prompts to draw candidates for."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from exo_megatron.data.building import Draft, Limits
from exo_megatron.data.candidates import Columns, chat_prompt, parse_candidate_record, prompt_context
from exo_megatron.data.records import SourceRecord
from exo_megatron.data.tally import Tally
from exo_megatron.data.text import Chat, prompt_text
from exo_megatron.data.tokenizer import EncodedGroup, Tokenizer
from exo_megatron.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """One prompt: the text that the model sees (chat messages rendered) and its token ids.

    There are P >= 1 ids, BOS included. `chat` is the conversation, None if the data has a
    string; `columns` are the fields of its record that are none of ours.
    """

    id: str
    text: str
    ids: tuple[int, ...]
    chat: Chat | None = None
    columns: Columns = field(default_factory=dict)


@dataclass(frozen=True)
class PromptBuilder:
    """A builder of prompts, of records of any layout. Those of stored candidates keep their ids."""

    limits: Limits

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the texts."""
        return self.limits.tokenizer

    def draft(self, record: SourceRecord, tally: Tally) -> Draft[Prompt] | Prompt:
        """Return the prompt of stored candidates, or a draft. Raises DataError."""
        if "candidates" in record.fields:
            stored = parse_candidate_record(record)
            _check_storable(record.where, stored.chat)
            ids = self.limits.prompt(record, stored.prompt_ids)
            return Prompt(record.id, stored.prompt, ids, stored.chat, stored.columns)
        prompt = prompt_text(record.where, record.fields)
        _check_storable(record.where, chat_prompt(prompt))

        def finish(encoded: EncodedGroup) -> Prompt:
            ids = self.limits.prompt(record, encoded.prompt, tally)
            text = self.tokenizer.prompt_text(prompt)
            return Prompt(record.id, text, ids, *prompt_context(record.fields, prompt))

        return Draft(prompt, {}, finish)

    def note(self, where: str, item: Prompt, tally: Tally) -> None:
        """Count nothing: every prompt that is within the limits is as good as another."""


def _check_storable(where: str, chat: Chat | None) -> None:
    """Raise DataError for messages with values that are not JSON, such as the dates of a parquet file."""
    if chat is None:
        return
    try:
        json.dumps([chat.messages, chat.tools], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            where,
            f"has a message with a value that is not JSON ({error})",
            expected="strings, numbers, lists and objects",
            fix="convert the value, or remove it",
        ) from None
