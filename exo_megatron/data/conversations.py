"""Separation of whole conversations into a prompt and its answers, at the end of a turn."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, TypeVar

from exo_megatron.data.records import wrong_type
from exo_megatron.errors import DataError

Messages = list[dict[str, Any]]
Turn = TypeVar("Turn")

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Roles by the names that ShareGPT's "from" has for them."""

_FIRST_TURN = re.compile(r"(?:\n\n)?(Human|Assistant):")
_TURN = re.compile(r"\n\n(Human|Assistant):")
"""The beginning of a turn in a transcript such as those of Anthropic's HH-RLHF; the first needs no blank line.

Two expressions, because one that begins with a literal is found ten times as fast.
"""
_ROLES = {"Human": "user", "Assistant": "assistant"}


def separate(
    where: str, prompt: object, answers: Mapping[str, object], *, system: object = None, chat: bool
) -> tuple[Any, list[Any]]:
    """Return the prompt and its answers without the prompt, all strings or all messages.

    Args:
        where: the place of the record, for messages.
        prompt: a string, messages, or None where the answers are whole conversations that have the
            prompt in common.
        answers: strings or messages by the names of their fields, or none; with or without the prompt
            before them if they are messages or transcripts.
        system: text of a system message before the prompt, or None.
        chat: strings become messages: each turn of a transcript, else the prompt the user's and the
            answer the assistant's.

    Raises:
        DataError: the conversations do not part at a turn of the assistant, or the prompt cannot be
            told. Values of other kinds are returned as they are.
    """
    if all(isinstance(answer, str) for answer in answers.values()):
        texts = {name: str(answer) for name, answer in answers.items()}
        prompt, found = _separate_texts(where, prompt, texts)
        if isinstance(prompt, str) and chat:
            return _with_system(where, system, *_as_chat(where, prompt, found))
        if isinstance(prompt, str) and isinstance(system, str) and system.strip():
            raise DataError(
                where,
                "has text in 'system', which a prompt that stays a string has no place for",
                expected="messages",
                fix="set data.transcript=messages, or write it into the prompt",
            )
        return (prompt, found) if isinstance(prompt, str) else _with_system(where, system, prompt, found)
    conversations = {name: as_messages(where, name, answer) for name, answer in answers.items()}
    lists = {name: each for name, each in conversations.items() if each is not None}
    if len(lists) < len(answers):
        if prompt is None:
            name = next(name for name, each in conversations.items() if each is None)
            raise wrong_type(where, name, answers[name], "a whole conversation, as the other answers, or a 'prompt'")
        return prompt, list(answers.values())
    return _with_system(where, system, *_separate_messages(where, prompt, lists))


def as_messages(where: str, name: str, value: object) -> Messages | None:
    """Return a message or a list of them, ShareGPT's too, as a list with roles and contents.

    Nulls are left out, except as the content. None for another value. Raises DataError for an unknown speaker.
    """
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, list) or not items or not all(isinstance(item, Mapping) for item in items):
        return None
    found = []
    for item in items:
        message = {key: field for key, field in item.items() if field is not None or key == "content"}
        if "from" in message and "role" not in message:
            speaker = message.pop("from")
            if speaker not in SPEAKERS:
                raise wrong_type(where, f"{name} from", speaker, f"one of {', '.join(SPEAKERS)}")
            message = {"role": SPEAKERS[speaker], "content": message.pop("value", None), **message}
        found.append(message)
    return found


def _separate_texts(where: str, prompt: object, texts: Mapping[str, str]) -> tuple[Any, list[str]]:
    if prompt is None:
        return _split_transcripts(where, texts)
    if isinstance(prompt, str) and _has_turns(prompt) and all(text.startswith(prompt) for text in texts.values()):
        rests = [text[len(prompt) :] for text in texts.values()]
        marker = _FIRST_TURN.match(rests[0])
        if marker is not None and all(rest.startswith(marker.group()) for rest in rests):
            return prompt + marker.group(), [rest[marker.end() :] for rest in rests]
        return prompt, rests
    return as_messages(where, "prompt", prompt) or prompt, list(texts.values())


def _separate_messages(where: str, prompt: object, lists: Mapping[str, Messages]) -> tuple[Any, list[Messages]]:
    conversations = list(lists.values())
    if prompt is None:
        return _split_messages(where, lists)
    if isinstance(prompt, str):
        if all(each[0].get("role") == "assistant" for each in conversations):
            return [{"role": "user", "content": prompt}], conversations
        before, rests = _split_messages(where, lists)
        if not any(each.get("role") == "user" and each.get("content") == prompt for each in before):
            raise DataError(
                where,
                f"'prompt' is a string that is no message of the user in {' and '.join(map(repr, lists))}",
                expected="the text of a message that they have in common",
                fix="name the columns to read with data.columns, without 'prompt' if the conversations are whole",
            )
        return before, rests
    given = as_messages(where, "prompt", prompt)
    if given is not None and all(each[: len(given)] == given for each in conversations):
        return given, [each[len(given) :] for each in conversations]
    return prompt if given is None else given, conversations


def _shared(conversations: Sequence[Sequence[Any]]) -> int:
    """Count the turns that all conversations begin with."""
    count = 0
    for turns in zip(*conversations, strict=False):
        if turns.count(turns[0]) < len(turns):
            break
        count += 1
    return count


def _parting(where: str, names: Sequence[str], turns: Sequence[Sequence[Turn]], role_of: Callable[[Turn], str]) -> int:
    """Return the number of turns of the prompt: after it, every conversation goes on with the assistant's.

    If one conversation is the beginning of another, its last turn of the assistant is its answer.
    """
    count = _shared(turns)
    if any(len(each) == count for each in turns):
        count = max((place for place in range(1, count) if role_of(turns[0][place]) == "assistant"), default=0)
    them = " and ".join(map(repr, names))
    if count == 0:
        raise DataError(
            where,
            f"has no 'prompt', and {them} have no turn in common before an answer",
            expected="conversations that begin with the same prompt, or a 'prompt' apart",
            fix="add 'prompt', or remove the record",
        )
    for each in turns:
        if role_of(each[count]) != "assistant":
            raise DataError(
                where,
                f"has no 'prompt', and {them} part at turn {count + 1}, which is of the {role_of(each[count])}",
                expected="conversations that part at an answer of the assistant",
                fix="remove the record: its answers do not answer the same prompt",
            )
    return count


def _split_messages(where: str, lists: Mapping[str, Messages]) -> tuple[Messages, list[Messages]]:
    conversations = list(lists.values())
    count = _parting(where, list(lists), conversations, lambda message: str(message.get("role")))
    return conversations[0][:count], [each[count:] for each in conversations]


def _has_turns(text: str) -> bool:
    return _FIRST_TURN.match(text) is not None or _TURN.search(text) is not None


def _turns(text: str) -> tuple[str, list[tuple[str, str, str]]]:
    """Return what stands before the first turn, and of each turn the marker, the role and the text."""
    first = _FIRST_TURN.match(text)
    head, *rest = _TURN.split(text) if first is None else ("", first.group(1), *_TURN.split(text[first.end() :]))
    speakers = rest[::2]
    markers = [f"\n\n{speaker}:" for speaker in speakers]
    if first is not None:
        markers[0] = first.group()
    return head, list(zip(markers, map(_ROLES.__getitem__, speakers), rest[1::2], strict=True))


def _split_transcripts(where: str, texts: Mapping[str, str]) -> tuple[str, list[str]]:
    """Split transcripts after the marker of the assistant's turn in which they part."""
    split = {name: _turns(text) for name, text in texts.items()}
    heads = {head for head, _ in split.values()}
    if len(heads) > 1 or not all(turns for _, turns in split.values()):
        raise DataError(
            where,
            f"has {' and '.join(map(repr, texts))} but no 'prompt': they are probably whole dialogues",
            expected="prompt and answers apart, or transcripts with turns of 'Human:' and 'Assistant:'",
            fix="split them after their common beginning, at the end of a turn, and add 'prompt'",
        )
    turns = [each for _, each in split.values()]
    count = _parting(where, list(texts), turns, itemgetter(1))
    for name, each in zip(texts, turns, strict=True):
        if len(each) > count + 1:
            raise DataError(
                where,
                f"{name!r} goes on for {len(each) - count} turns after the common prompt",
                expected="one answer of the assistant",
                fix="remove the record, or give prompt and answers apart",
            )
    answers = [each[count][2] for each in turns]
    return next(iter(texts.values())).removesuffix(answers[0]), answers


def _as_chat(where: str, prompt: str, answers: Sequence[str]) -> tuple[Messages, list[Messages]]:
    """Make messages of a prompt and its answers; those of a transcript lose the spaces around them."""
    head, turns = _turns(prompt)
    if not turns:
        return [{"role": "user", "content": prompt}], [[{"role": "assistant", "content": each}] for each in answers]
    for answer in answers:
        if _has_turns(answer):
            raise DataError(
                where,
                "has an answer that goes on with another turn of its transcript",
                expected="one answer of the assistant",
                fix="remove the record, or write it as messages",
            )
    if turns[-1][1] == "assistant" and not turns[-1][2].strip():
        turns = turns[:-1]
    system = [{"role": "system", "content": head.strip()}] if head.strip() else []
    messages = [{"role": role, "content": text.strip()} for _, role, text in turns]
    return [*system, *messages], [[{"role": "assistant", "content": each.strip()}] for each in answers]


def _with_system(where: str, system: object, prompt: Any, answers: list[Any]) -> tuple[Any, list[Any]]:
    if not isinstance(prompt, list) or not isinstance(system, str) or not system.strip():
        return prompt, answers
    if prompt and prompt[0].get("role") == "system":
        raise DataError(
            where,
            "has a system message in 'system' and another one in its conversation",
            expected="one of them",
            fix="remove one, or name the columns to read with data.columns",
        )
    return [{"role": "system", "content": system}, *prompt], answers
