"""Reading of a data source as records in our own fields, and descriptions of what was read."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from exo_megatron.config.sections import CandidatesDataConfig, DataConfig
from exo_megatron.data.groups import Group
from exo_megatron.data.record_layouts import KNOWN, LAYOUTS, STAGES, STORED, RecordLayout, Use
from exo_megatron.data.records import Fields, SourceRecord, require, wrong_type
from exo_megatron.data.tokenizer import Tokenizer
from exo_megatron.errors import ConfigError, DataError

FIELDS = frozenset({"prompt", "chosen", "rejected", "completions", "rewards", "messages", "text"})
"""Our own fields. A record has some of them, and all columns that its layout does not take."""

FURTHER = ("tools", "log_weights", "reference_token_logprobs", "behaviour_token_logprobs")
"""Columns that belong to no layout in particular, by our names for them."""

USUAL: Mapping[Use, tuple[str, ...]] = {
    "prompts": ("prompt",),
    "sft": ("prompt", "chosen"),
    "score": ("prompt", "completions"),
    "preference": ("prompt", "chosen", "rejected"),
    "rewards": ("prompt", "completions", "rewards"),
}
"""Columns of the layout that messages propose."""

TrainOn = Literal["last", "all"]


@dataclass
class Seen:
    """Counts of what records were taken for, which go on over shares of a source.

    Attributes:
        read: records.
        made: records in our own fields; more where each answer of a conversation is one.
        layouts: records by name of the layout and the columns that it took, as written there.
        columns: all columns of the records.
    """

    read: int = 0
    made: int = 0
    layouts: Counter[tuple[str, tuple[str, ...]]] = field(default_factory=Counter)
    columns: set[str] = field(default_factory=set)

    def add(self, other: Seen) -> None:
        """Add the counts of records that follow."""
        self.read += other.read
        self.made += other.made
        self.layouts.update(other.layouts)
        self.columns |= other.columns


@dataclass(frozen=True)
class Interpreter:
    """A converter of records to records in our own fields; see the keys of `data`.

    Attributes:
        use: what they are read for.
        columns: our names of columns -> those of the records; None for those of a known layout.
        chat: whether strings become messages.
        train_on: the answers of a whole conversation that become records.
    """

    use: Use
    columns: Mapping[str, str] | None = None
    chat: bool = False
    train_on: TrainOn = "last"

    @classmethod
    def of(cls, config: DataConfig | CandidatesDataConfig, use: Use) -> Interpreter:
        """Take the settings of `data`. Raises ConfigError for `data.columns` of no layout."""
        for ours in config.columns:
            if ours not in KNOWN and ours not in FURTHER:
                raise ConfigError(
                    f"data.columns.{ours}",
                    "is no column that a layout has",
                    expected=f"one of {', '.join(sorted((*KNOWN, *FURTHER)))}",
                    fix="correct the name; our names are the keys, those of the data the values",
                )
        train_on = config.train_on if isinstance(config, DataConfig) else "last"
        return cls(use, config.columns or None, config.transcript == "messages", train_on)

    def convert(self, record: SourceRecord, seen: Seen) -> list[SourceRecord]:
        """Convert a record to one in our own fields, or to several, and count it.

        Raises:
            DataError: a bad record; columns of no layout for this use, or of several that differ.
            ConfigError: `data.train_on` for a record with one answer.
        """
        seen.read += 1
        seen.columns.update(record.fields)
        visible = _visible(record.fields, self.columns)
        layout, converted = _convert(record, visible, self.use, self.chat, self.train_on)
        used = frozenset(layout.known & visible.keys())
        seen.layouts[layout.name, tuple(sorted(used))] += 1
        taken = self._taken(used)
        others = {name: value for name, value in record.fields.items() if name not in taken}
        rest = {} if layout is STORED else {**others, **_further(visible)}
        seen.made += len(converted)
        names = [record.id] if len(converted) == 1 else [f"{record.id}#{n + 1}" for n in range(len(converted))]
        return [
            SourceRecord(record.where, name, {**rest, **fields}) for name, fields in zip(names, converted, strict=True)
        ]

    def _taken(self, used: frozenset[str]) -> frozenset[str]:
        """Return the names that no further column of a record has, of which those `used` became our fields.

        One that is called as the field of stored candidates would be taken for it.
        """
        if self.use == "prompts":  # whose other columns go to the reward source, whatever their names
            return used.union(STORED.columns)
        named = (self.columns or {}).items()
        return FIELDS.union(used, STORED.columns, (theirs for ours, theirs in named if ours in used))

    def check_columns(self, source: str, seen: Seen) -> None:
        """Raise ConfigError if `data.columns` names a column that no record has."""
        for ours, theirs in (self.columns or {}).items():
            if theirs not in seen.columns:
                raise ConfigError(
                    f"data.columns.{ours}",
                    f"got {theirs!r}, which is no column of {source}",
                    expected=f"one of its columns: {', '.join(sorted(seen.columns))}",
                    fix="correct the name",
                )

    def describe(self, source: str, format: str, seen: Seen) -> str:
        """Describe what the records of a source were taken for: format, layouts, columns used and ignored."""
        names = self.columns or {}
        theirs = {name: names.get(name, name) for _, used in seen.layouts for name in used}
        shown = {name: name if name == column else f"{name}={column}" for name, column in theirs.items()}
        taken = ", ".join(
            f"{count} as {layout} ({', '.join(shown[name] for name in used)})"
            for (layout, used), count in seen.layouts.items()
        )
        others = sorted(seen.columns - set(theirs.values()) - {"id"})
        more = f" (make {seen.made})" if seen.made != sum(seen.layouts.values()) else ""
        left = f"; other columns: {', '.join(others)}" if others else ""
        return f"{source}: {format}, {seen.read} record{'s' * (seen.read != 1)}{more}: {taken}{left}"


def _visible(fields: Fields, columns: Mapping[str, str] | None) -> Fields:
    """Return the columns to recognise a layout by: those that are named, or all, under our names."""
    if not columns:
        return fields
    return {ours: fields[theirs] for ours, theirs in columns.items() if theirs in fields}


def _further(visible: Fields) -> Fields:
    return {name: visible[name] for name in FURTHER if name in visible}


def _convert(
    record: SourceRecord, fields: Fields, use: Use, chat: bool, train_on: TrainOn
) -> tuple[RecordLayout, list[dict[str, Any]]]:
    """Convert a record with the layout that its columns fit.

    Where they fit several, all readings have to be the same.
    """
    _refuse(record.where, fields, use)
    layouts = _fitting(frozenset(fields) & KNOWN, use)
    if not layouts:
        raise _no_layout(record.where, fields, use)
    readings: list[list[dict[str, Any]]] = []
    errors: list[DataError] = []
    for layout in layouts:
        try:
            converted = layout.convert(record.where, fields, chat)
            readings.append(_for_use(record.where, layout, converted, use, train_on))
        except DataError as error:
            errors.append(error)
    if not readings:
        raise errors[0]
    if errors or any(each != readings[0] for each in readings[1:]):
        raise DataError(
            record.where,
            f"can be read as {' or as '.join(_named(layout) for layout in layouts)}, which differ",
            expected="columns with one meaning",
            fix="name the columns to read with data.columns",
        )
    return layouts[0], readings[0]


@lru_cache(maxsize=1024)
def _fitting(columns: frozenset[str], use: Use) -> tuple[RecordLayout, ...]:
    """List the layouts of the columns, without those that are a part of another one."""
    if set(STORED.columns) <= columns:
        return (STORED,) if use in STORED.uses else ()
    fitting = [layout for layout in LAYOUTS if use in layout.uses and set(layout.columns) <= columns]
    return tuple(
        layout
        for layout in fitting
        if not any(set(layout.columns) < other.known and other is not layout for other in fitting)
    )


def _named(layout: RecordLayout) -> str:
    return f"{layout.name} ({', '.join(layout.columns)})"


def _refuse(where: str, fields: Fields, use: Use) -> None:
    """Raise DataError for data that no stage can use, though their columns look like others."""
    problem = None
    if "completion" in fields and _is_verdict(fields.get("label")):
        problem = "is unpaired preference data (KTO): 'label' says whether its one completion is wanted"
    elif "completions" in fields and "labels" in fields and "rewards" not in fields:
        problem = "is stepwise supervision: 'labels' judge the steps of one answer, which stand in 'completions'"
    elif {"message_id", "role", "text"} <= fields.keys():
        problem = "is one message of a tree (OpenAssistant), not a conversation"
    if problem is not None and use != "prompts":
        raise DataError(
            where,
            problem,
            expected="pairs (chosen, rejected), or completions of one prompt with their rewards",
            fix="put wanted and unwanted answers of a prompt into one record; data.md lists the layouts",
        )


def _is_verdict(label: object) -> bool:
    return isinstance(label, bool) or label in (0, 1, "0", "1", "true", "false", "True", "False")


def _no_layout(where: str, fields: Fields, use: Use) -> DataError:
    """Make the error for columns that have no meaning for this use."""
    missing = [name for name in USUAL[use] if name not in fields]
    misspelt = any(difflib.get_close_matches(name, fields.keys() - KNOWN, n=1, cutoff=0.5) for name in missing)
    others = [layout for layout in (STORED, *LAYOUTS) if set(layout.columns) <= fields.keys()]
    largest = max(others, key=lambda layout: len(layout.columns), default=None)
    if largest is None or misspelt:
        try:
            require(where, fields, missing[0])
        except DataError as error:
            return DataError(where, error.problem, expected=error.expected, fix=f"{error.fix}, or set data.columns")
    stages = [STAGES[other] for other in STAGES if largest is not None and other in largest.uses]
    present = ", ".join(sorted(fields))
    return DataError(
        where,
        f"is {_named(largest) if largest else 'nothing known'}, which {STAGES[use]} cannot use",
        expected=f"for example {', '.join(USUAL[use])}",
        fix=f"use it with {', '.join(stages)}, or name other columns with data.columns (there are {present})",
    )


def _for_use(
    where: str, layout: RecordLayout, converted: dict[str, Any], use: Use, train_on: TrainOn
) -> list[dict[str, Any]]:
    """Keep what a use reads of a record: several where each turn of a conversation is trained on."""
    if layout is STORED:
        return [converted]
    messages = converted.get("messages")
    if messages is not None and use == "prompts":
        prompt = messages[:-1] if messages[-1].get("role") == "assistant" else messages
        return [{"prompt": [_unweighted(where, message)[0] for message in prompt]}]
    if messages is not None:
        return _turns(where, messages, train_on)
    if train_on == "all":
        raise ConfigError(
            "data.train_on",
            f"got 'all', but {where} is {_named(layout)}, which has one answer",
            expected="whole conversations (messages, conversations)",
            fix="remove data.train_on",
        )
    kept = {"prompts": ("prompt",), "sft": ("prompt", "chosen", "text")}.get(use, tuple(FIELDS))
    return [{name: value for name, value in converted.items() if name in kept}]


def _turns(where: str, messages: Sequence[Mapping[str, Any]], train_on: TrainOn) -> list[dict[str, Any]]:
    """Make a record of the last message of the assistant, or of each, with those before it as the prompt."""
    plain, trained = zip(*(_unweighted(where, message) for message in messages), strict=True)
    answers = [k for k, message in enumerate(plain) if message.get("role") == "assistant" and trained[k]]
    if not answers or answers[0] == 0 or plain[-1].get("role") != "assistant":
        roles = ", ".join(str(message.get("role")) for message in plain)
        raise DataError(
            where,
            f"is a conversation of {roles}" + (" without an answer to train on" if not answers else ""),
            expected="a conversation that begins with another's message than the assistant's and ends with the "
            "assistant's",
            fix="remove the messages after the last answer or before the first question",
        )
    if train_on == "last":
        if answers[-1] != len(plain) - 1:
            raise wrong_type(where, "weight", 0, "another weight for the last answer, or data.train_on=all")
        answers = answers[-1:]
    return [{"prompt": list(plain[:k]), "chosen": [plain[k]]} for k in answers]


def _unweighted(where: str, message: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """Return a message without OpenAI's "weight", and whether that lets it be trained on."""
    if "weight" not in message:
        return message, True
    weight = message["weight"]
    if isinstance(weight, bool) or weight not in (0, 1):
        raise wrong_type(where, "weight", weight, "0 or 1")
    return {name: value for name, value in message.items() if name != "weight"}, weight == 1


def describe_group(group: Group, tokenizer: Tokenizer) -> str:
    """Write a group as the model sees it, special tokens included."""
    answers = [shortened(tokenizer.show(candidate)) for candidate in group.candidates[:2]]
    more = f" and {len(group.candidates) - 2} more" if len(group.candidates) > 2 else ""
    return f"the first is {shortened(tokenizer.show(group.prompt))} with {' and '.join(answers)}{more}"


def shortened(text: str, most: int = 300) -> str:
    """Write a text in quotes, without its middle if it is long."""
    shown = repr(text)
    return shown if len(shown) <= most else f"{shown[: most // 2]} ... {shown[-most // 2 :]}"
