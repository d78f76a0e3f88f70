"""Prompts and candidates as strings or chat messages: of a record, and on their way to token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from exo_megatron.data.records import Fields, list_field, require, unicode_text, wrong_type
from exo_megatron.errors import DataError, EmptyError

Message: TypeAlias = Mapping[str, Any]
"""A chat message: {"role": ..., "content": ...} and what else the chat template uses, such as tool_calls."""


@dataclass(frozen=True)
class Chat:
    """A conversation, and the JSON schemas of the tools that the assistant may call in it."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    def followed_by(self, answer: Sequence[Message]) -> Chat:
        """Return the conversation with more messages."""
        return Chat((*self.messages, *answer), self.tools)


Text: TypeAlias = str | Chat
"""A prompt: a string, or a conversation for the tokenizer's chat template."""

Answer: TypeAlias = str | tuple[Message, ...]
"""A candidate's text: a string, or the messages that follow a prompt of messages, the assistant's first and last."""


class TextCodec(Protocol):
    """One of the two kinds of tokenizers.

    `continuation` means that the text follows other text and does not begin one.
    """

    @property
    def description(self) -> str:
        """SHA-256 of all that ids and renderings depend on."""

    @property
    def ids(self) -> frozenset[int]:
        """All ids that are a token."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens that were added, which ordinary text does not have."""

    @property
    def eos_id(self) -> int:
        """Id of the end-of-sequence token."""

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids that the tokenizer puts before a text by default: usually the BOS id, or none."""

    def encode(self, text: str, *, continuation: bool) -> list[int]:
        """Return the ids of the text alone, without the default prefix."""

    def encode_batch(self, texts: Sequence[str], *, continuation: bool) -> list[list[int]]:
        """Return the ids of each of the texts, the same as `encode`, in one thread."""

    def decode(self, ids: Sequence[int], *, continuation: bool) -> str:
        """Return the text of the ids without special tokens."""

    def show(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, special tokens included."""

    def render(self, chat: Chat, *, generation_prompt: bool) -> str:
        """Render a conversation with the chat template.

        Raises DataError if there is no template, it refuses the messages, or leaves out a part of them.
        """


def prompt_text(where: str, fields: Fields, name: str = "prompt") -> Text:
    """Return a prompt: a string, or chat messages that do not end with the assistant's.

    The tools that the assistant may call in them are in the field "tools". Raises DataError for another
    value, and for tools beside a string.
    """
    value = _text_or_messages(where, name, require(where, fields, name))
    if isinstance(value, str):
        if "tools" in fields:
            raise DataError(
                where,
                f"has 'tools', but {name!r} is a string",
                expected="chat messages, with which a chat template writes the tools",
                fix="write them into the prompt and remove 'tools', or give messages",
            )
        return value
    if value[-1]["role"] == "assistant":
        raise DataError(
            where,
            f"{name!r} ends with a message of the assistant",
            expected="a prompt that ends with the turn to be answered",
            fix="move the assistant's last message into the completion",
        )
    return Chat(value, _tools(where, fields))


def completion_text(where: str, fields: Fields, name: str, *, prompt: Text) -> Answer:
    """Return a candidate of `prompt`: a string, or messages if the prompt is messages.

    The first and the last of them are the assistant's. Raises DataError for another value and for an
    empty text.
    """
    return _completion(where, name, require(where, fields, name), prompt)


def completion_texts(where: str, fields: Fields, name: str, *, prompt: Text) -> list[Answer]:
    """Return a non-empty list of candidates of `prompt`, each as `completion_text` returns it."""
    values = list_field(where, fields, name, "a list of completions")
    if not values:
        raise EmptyError(where, f"{name!r} is empty", expected="at least one completion", fix="remove the record")
    return [_completion(where, f"{name}[{k}]", value, prompt) for k, value in enumerate(values)]


def _completion(where: str, name: str, value: object, prompt: Text) -> Answer:
    completion = _text_or_messages(where, name, value)
    if isinstance(completion, str) != isinstance(prompt, str):
        kinds = ("a string", "a list of messages")
        raise DataError(
            where,
            f"'prompt' is {kinds[not isinstance(prompt, str)]}, {name!r} is {kinds[not isinstance(completion, str)]}",
            expected="both strings, or both lists of messages",
            fix="write the completion as the prompt is written",
        )
    if not isinstance(completion, str) and not completion[0]["role"] == completion[-1]["role"] == "assistant":
        raise DataError(
            where,
            f"{name!r} has messages of {', '.join(message['role'] for message in completion)}",
            expected="messages of which the first and the last are the assistant's",
            fix="move all messages before the completion into 'prompt'",
        )
    last = completion if isinstance(completion, str) else completion[-1]["content"]
    if last is not None and not last.strip() and (isinstance(completion, str) or "tool_calls" not in completion[-1]):
        raise EmptyError(
            where, f"{name!r} is an empty completion", expected="text", fix="remove the record or the completion"
        )
    return completion


def _text_or_messages(where: str, name: str, value: object) -> Answer:
    if isinstance(value, str):
        return unicode_text(where, name, value)
    if not isinstance(value, Sequence) or not value:
        raise wrong_type(where, name, value, "a string or a non-empty list of chat messages")
    return tuple(_message(where, f"{name}[{k}]", item) for k, item in enumerate(value))


def _message(where: str, name: str, value: object) -> Message:
    """Return a message with all its fields but nulls; its content may be null beside tool calls."""
    expected = 'a message {"role": string, "content": string}, whose content may be null beside "tool_calls"'
    if not isinstance(value, Mapping):
        raise wrong_type(where, name, value, expected)
    message = {key: field for key, field in value.items() if field is not None}
    if message.get("tool_calls"):
        message.setdefault("content", None)
    else:
        message.pop("tool_calls", None)
    if not isinstance(message.get("role"), str) or not isinstance(message.get("content", 0), str | None):
        raise wrong_type(where, name, value, expected)
    for part in _strings(message):
        unicode_text(where, name, part)
    return message


def _strings(value: object) -> Iterator[str]:
    """List all strings in a JSON value, keys included."""
    match value:
        case str():
            yield value
        case Mapping():
            for key, item in value.items():
                yield from (*_strings(key), *_strings(item))
        case list() | tuple():
            for item in value:
                yield from _strings(item)


def _tools(where: str, fields: Fields) -> tuple[Mapping[str, Any], ...]:
    """Return the JSON schemas of tools, a list or, as some data sets store it, its JSON text."""
    value = fields.get("tools", [])
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise wrong_type(where, "tools", value, "a list of objects, each the JSON schema of a tool")
    for part in _strings(value):
        unicode_text(where, "tools", part)
    return tuple(value)
