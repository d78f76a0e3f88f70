"""Typed access to the fields of a record, with errors that name the place, the value and the nearest field."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from exo_megatron.data.tokenizer import Message, Text
from exo_megatron.errors import DataError

Fields = Mapping[str, Any]


def require(where: str, fields: Fields, name: str) -> Any:
    """The value of a field; a missing one is a DataError that offers the fields with similar names."""
    if name in fields:
        return fields[name]
    near = difflib.get_close_matches(name, list(fields), n=2, cutoff=0.5)
    present = ", ".join(sorted(fields)) or "none"
    raise DataError(
        where,
        f"has no field {name!r} (fields: {present})",
        expected=f"a field {name!r}",
        fix=f"rename {' or '.join(map(repr, near))} to {name!r}" if near else f"add {name!r}",
    )


def text(where: str, fields: Fields, name: str) -> str:
    """A string field."""
    value = require(where, fields, name)
    if not isinstance(value, str):
        raise wrong_type(where, name, value, "a string")
    return _unicode(where, name, value)


def boolean(where: str, fields: Fields, name: str) -> bool:
    """A true/false field."""
    value = require(where, fields, name)
    if not isinstance(value, bool):
        raise wrong_type(where, name, value, "true or false")
    return value


def finite_number(where: str, fields: Fields, name: str) -> float:
    """A number that is neither NaN nor infinite."""
    return _finite(where, name, require(where, fields, name))


def finite_numbers(where: str, fields: Fields, name: str) -> tuple[float, ...]:
    """A list of numbers, none of them NaN or infinite."""
    values = _list(where, fields, name, "a list of numbers")
    return tuple(_finite(where, f"{name}[{k}]", value) for k, value in enumerate(values))


def token_ids(where: str, fields: Fields, name: str) -> tuple[int, ...]:
    """A non-empty list of token ids."""
    values = _list(where, fields, name, "a list of token ids")
    if not values or not all(type(value) is int and value >= 0 for value in values):
        raise wrong_type(where, name, values, "a non-empty list of token ids >= 0")
    return tuple(values)


def object_list(where: str, fields: Fields, name: str) -> list[Fields]:
    """A non-empty list of JSON objects."""
    values = _list(where, fields, name, "a list of objects")
    if not values or not all(isinstance(value, Mapping) for value in values):
        raise wrong_type(where, name, values, "a non-empty list of objects")
    return list(values)


def prompt_text(where: str, fields: Fields, name: str = "prompt") -> Text:
    """A prompt: a string, or chat messages of which the last is not the assistant's."""
    value = _text_or_messages(where, name, require(where, fields, name))
    if not isinstance(value, str) and value[-1]["role"] == "assistant":
        raise DataError(
            where,
            f"{name!r} ends with a message of the assistant",
            expected="a prompt that ends with the turn to be answered",
            fix="move the assistant's last message into the completion",
        )
    return value


def completion_text(where: str, fields: Fields, name: str, *, prompt: Text) -> Text:
    """A completion of `prompt`: a string, or one assistant message where the prompt is chat messages."""
    return _completion(where, name, require(where, fields, name), prompt)


def completion_texts(where: str, fields: Fields, name: str, *, prompt: Text) -> list[Text]:
    """A non-empty list of completions of `prompt`."""
    values = _list(where, fields, name, "a list of completions")
    if not values:
        raise DataError(where, f"{name!r} is empty", expected="at least one completion", fix="remove the record")
    return [_completion(where, f"{name}[{k}]", value, prompt) for k, value in enumerate(values)]


def wrong_type(where: str, name: str, value: object, expected: str) -> DataError:
    """The error for a value of the wrong kind, which is shown shortened."""
    shown = repr(value)
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return DataError(where, f"{name!r} is {shown}", expected=expected, fix="correct the record")


def _completion(where: str, name: str, value: object, prompt: Text) -> Text:
    completion = _text_or_messages(where, name, value)
    if isinstance(completion, str) != isinstance(prompt, str):
        kinds = ("a string", "a list of messages")
        raise DataError(
            where,
            f"'prompt' is {kinds[not isinstance(prompt, str)]}, {name!r} is {kinds[not isinstance(completion, str)]}",
            expected="both strings, or both lists of messages",
            fix="write the completion as the prompt is written",
        )
    if not isinstance(completion, str) and (len(completion) != 1 or completion[0]["role"] != "assistant"):
        raise DataError(
            where,
            f"{name!r} has messages of {', '.join(message['role'] for message in completion)}",
            expected="exactly one message, of the assistant",
            fix="move all messages before the last answer into 'prompt'",
        )
    content = completion if isinstance(completion, str) else completion[0]["content"]
    if not content.strip():
        raise DataError(
            where, f"{name!r} is an empty completion", expected="text", fix="remove the record or the completion"
        )
    return completion


def _text_or_messages(where: str, name: str, value: object) -> Text:
    if isinstance(value, str):
        return _unicode(where, name, value)
    if not isinstance(value, Sequence) or not value:
        raise wrong_type(where, name, value, "a string or a non-empty list of chat messages")
    return [_message(where, f"{name}[{k}]", item) for k, item in enumerate(value)]


def _message(where: str, name: str, value: object) -> Message:
    expected = 'a message {"role": string, "content": string}'
    if not isinstance(value, Mapping):
        raise wrong_type(where, name, value, expected)
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise wrong_type(where, name, value, expected)
    return {"role": role, "content": _unicode(where, name, content)}


def _unicode(where: str, name: str, value: str) -> str:
    """The text, unless it holds half of a surrogate pair: JSON can write that, no tokenizer can read it."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            where,
            f"{name!r} has an unpaired surrogate ({error.object[error.start]!a}) at character {error.start}",
            expected="Unicode text",
            fix="correct the record: a character above U+FFFF was cut in two",
        ) from None
    return value


def _list(where: str, fields: Fields, name: str, expected: str) -> list[Any]:
    value = require(where, fields, name)
    if not isinstance(value, list):
        raise wrong_type(where, name, value, expected)
    return value


def _finite(where: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(where, name, value, "a finite number")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the range of float
        number = math.inf
    if not math.isfinite(number):
        raise wrong_type(where, name, value, "a finite number")
    return number
