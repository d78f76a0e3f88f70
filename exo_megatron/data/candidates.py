"""The stored candidates of `rollout` and `score`: one JSON record per prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from exo_megatron.data.logprob_source import LogprobSource, parse_source
from exo_megatron.data.records import (
    Fields,
    SourceRecord,
    boolean,
    finite_number,
    finite_numbers,
    object_list,
    text,
    token_ids,
    wrong_type,
)
from exo_megatron.data.text import Chat, Message, Text, prompt_text
from exo_megatron.errors import DataError
from exo_megatron.utils.files import write_jsonl

ROLLOUT_FILE = "rollout.json"
"""Description of the rollout that drew the candidates beside it."""

_LEAST_BYTES = 128
"""Bytes of a stored candidate of one token without text."""

Columns: TypeAlias = Mapping[str, Any]
"""The columns of a record that are none of our fields, as JSON values. A null is an absent column."""


@dataclass(frozen=True)
class Candidate:
    """One sampled candidate.

    Attributes:
        text: its text.
        token_ids: R >= 1 ids as sampled, never re-encoded.
        finished: whether it ended by itself, so that the last id is end-of-sequence.
        logprob: sum over all its tokens, in nats, under softmax(logits / temperature) of the policy
            that drew it, without any truncation of that distribution.
        logprob_digest: digest of the record's source and of the ids that the log-prob belongs to
            (see LogprobSource.digest).
    """

    text: str
    token_ids: tuple[int, ...]
    finished: bool
    logprob: float | None = None
    logprob_digest: str | None = None


@dataclass(frozen=True)
class CandidateRecord:
    """One prompt, its K >= 1 candidates and, once scored, their K rewards.

    `logprob_source` describes the forward pass of training that computed the log-probs; every
    candidate then has one with its digest. It is None if the log-probs, if any, came from
    elsewhere, and then no run uses them.

    `chat` is the conversation that `prompt` was rendered from, None for a prompt that was a string.
    It is stored as `prompt_messages` and `prompt_tools`. `columns` are those of the prompt's record
    that are none of our fields.
    """

    id: str
    prompt: str
    prompt_ids: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    rewards: tuple[float, ...] | None = None
    logprob_source: LogprobSource | None = None
    chat: Chat | None = None
    columns: Columns = field(default_factory=dict)

    @property
    def prompt_text(self) -> str:
        """The prompt that a reward source reads."""
        return self.prompt

    @property
    def texts(self) -> tuple[str, ...]:
        """The K texts that a reward source reads."""
        return tuple(candidate.text for candidate in self.candidates)

    @property
    def answers(self) -> tuple[tuple[Message, ...], ...]:
        """The K candidates as messages that follow those of `chat`."""
        return tuple(({"role": "assistant", "content": text},) for text in self.texts)

    @property
    def logprobs(self) -> tuple[float, ...]:
        """The K log-probs, for a record that has a `logprob_source`."""
        return tuple(candidate.logprob for candidate in self.candidates if candidate.logprob is not None)


_MESSAGES, _TOOLS, _COLUMNS = "prompt_messages", "prompt_tools", "columns"
_OWN_FIELDS = frozenset({*CandidateRecord.__dataclass_fields__, _MESSAGES, _TOOLS} - {"chat"})
"""Names of the fields of a stored record; a user's own fields beside them are columns."""


def prompt_context(fields: Fields, prompt: Text) -> tuple[Chat | None, dict[str, Any]]:
    """Return what a reward source may read besides a text: the conversation and columns of a prompt's record."""
    return chat_prompt(prompt), other_columns(fields, ("id", "prompt", "tools"))


def chat_prompt(prompt: Text) -> Chat | None:
    """Return the conversation of a prompt, None if it is a string."""
    return None if isinstance(prompt, str) else prompt


def other_columns(fields: Fields, own: Collection[str]) -> dict[str, Any]:
    """Return the fields whose names are not `own`.

    Values that are not JSON (images, dates, NaN, halves of surrogate pairs) cannot be stored and
    are left out.
    """
    return {name: value[0] for name in fields if name not in own and (value := _as_json(name, fields[name]))}


def least_bytes(prompts: int, candidates: int) -> int:
    """Return how many bytes of a file the candidates of so many prompts have at the very least."""
    return prompts * candidates * _LEAST_BYTES


def write_candidates(path: Path, records: Iterable[CandidateRecord]) -> None:
    """Write records to the file `path` atomically.

    Raises ValueError for log-probs and rewards that are not finite.
    """
    write_jsonl(path, map(stored_candidates, records))


def stored_candidates(record: CandidateRecord) -> dict[str, Any]:
    """Convert a record to the JSON values that are stored. Unknown values are absent, not null.

    Raises ValueError for log-probs and rewards that are not finite.
    """
    logprobs = [candidate.logprob for candidate in record.candidates if candidate.logprob is not None]
    if not all(map(math.isfinite, (*logprobs, *(record.rewards or ())))):
        raise ValueError(f"record {record.id!r} has a log-prob or reward that is not finite")
    stored = _known(vars(record))  # not `asdict`, which copies every id
    stored.pop("chat", None)
    if record.logprob_source is not None:
        stored["logprob_source"] = asdict(record.logprob_source)
    if record.chat is not None:
        stored[_MESSAGES] = record.chat.messages
        if record.chat.tools:
            stored[_TOOLS] = record.chat.tools
    if not stored[_COLUMNS]:
        del stored[_COLUMNS]
    stored["candidates"] = [_known(vars(candidate)) for candidate in record.candidates]
    return stored


def parse_candidate_record(record: SourceRecord) -> CandidateRecord:
    """Check one stored record and convert it to its types.

    Raises DataError with the record's file and line.
    """
    where, stored = record.where, record.fields
    source = _parse_source(where, stored)
    candidates = tuple(
        _parse_candidate(f"{where} candidates[{k}]", item, sourced=source is not None)
        for k, item in enumerate(object_list(where, stored, "candidates"))
    )
    rewards = finite_numbers(where, stored, "rewards") if "rewards" in stored else None
    if rewards is not None and len(rewards) != len(candidates):
        raise DataError(
            where,
            f"has {len(rewards)} rewards for {len(candidates)} candidates",
            expected="one reward per candidate",
            fix="run `exo-megatron score` on the rollout again",
        )
    return CandidateRecord(
        id=record.id,
        prompt=text(where, stored, "prompt"),
        prompt_ids=token_ids(where, stored, "prompt_ids"),
        candidates=candidates,
        rewards=rewards,
        logprob_source=source,
        chat=_parse_chat(where, stored),
        columns=_parse_columns(where, stored),
    )


def _parse_source(where: str, fields: Mapping[str, Any]) -> LogprobSource | None:
    if "logprob_source" not in fields:
        return None
    stored = fields["logprob_source"]
    if not isinstance(stored, Mapping):
        raise wrong_type(where, "logprob_source", stored, "an object with fingerprint, temperature and precision")
    return parse_source(f"{where} logprob_source", stored)


def _parse_candidate(where: str, fields: Mapping[str, Any], *, sourced: bool) -> Candidate:
    """Parse one candidate. It must have a log-prob with its digest if `sourced`."""
    known = _known(fields)
    if sourced and not {"logprob", "logprob_digest"} <= known.keys():
        raise DataError(
            where,
            "has not both 'logprob' and 'logprob_digest', but its record has 'logprob_source'",
            expected="both for every candidate, as `exo-megatron rollout` writes them",
            fix="remove 'logprob_source' from the record: `align` then computes what it needs",
        )
    return Candidate(
        text=text(where, fields, "text"),
        token_ids=token_ids(where, fields, "token_ids"),
        finished=boolean(where, fields, "finished"),
        logprob=finite_number(where, known, "logprob") if "logprob" in known else None,
        logprob_digest=text(where, known, "logprob_digest") if sourced else None,
    )


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Remove nulls, which columnar data sets use for absent values."""
    return {name: value for name, value in fields.items() if value is not None}


def _parse_chat(where: str, fields: Fields) -> Chat | None:
    """Return the conversation of a stored prompt, None if it has none. Raises DataError for others."""
    if _MESSAGES not in fields:
        return None
    tools = {"tools": fields[_TOOLS]} if _TOOLS in fields else {}
    if isinstance(fields[_MESSAGES], str):
        raise wrong_type(where, _MESSAGES, fields[_MESSAGES], "a non-empty list of chat messages")
    return chat_prompt(prompt_text(where, {_MESSAGES: fields[_MESSAGES], **tools}, _MESSAGES))


def _parse_columns(where: str, fields: Fields) -> dict[str, Any]:
    """Return the stored columns and those that a user added beside our fields.

    Raises DataError if they are no object, or if a column is in both places.
    """
    stored = fields.get(_COLUMNS, {})
    if not isinstance(stored, Mapping):
        raise wrong_type(where, _COLUMNS, stored, "an object with the columns of the prompt's record")
    added = other_columns(fields, _OWN_FIELDS)
    twice = sorted(added.keys() & stored.keys())
    if twice:
        raise DataError(
            where,
            f"has the column {twice[0]!r} twice: beside the other fields and in {_COLUMNS!r}",
            expected="every column once",
            fix="remove one of them",
        )
    return {column: value for column, value in stored.items() if value is not None} | added


def _as_json(name: str, value: object) -> tuple[Any] | None:
    """Return the value as it would be read back from a JSON file, None if it cannot be stored."""
    try:
        text = json.dumps({name: value}, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError, RecursionError):
        return None
    return (json.loads(text)[name],)
