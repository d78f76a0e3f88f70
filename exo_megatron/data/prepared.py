"""Prepared prompts and groups: sequences of them that stand in memory-mapped Arrow tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any, Protocol, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from exo_megatron.data.groups import FURTHER_DIGESTED, Group, GroupLengths, digest_text, digest_texts
from exo_megatron.data.prompts import Prompt
from exo_megatron.data.text import Chat

Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)

VALUES = ("rewards", "reference_logprobs", "log_weights")
"""Fields of a group with a number per candidate."""

TOKEN_VALUES = ("reference_token_logprobs", "behaviour_token_logprobs")
"""Fields of a group with a number per token of each candidate."""


def groups_table(items: Sequence[tuple[str, Group]]) -> pa.RecordBatch:
    """Store groups, each with the place of its record, as a table. A field that is None is an empty list."""
    groups = [group for _, group in items]
    columns = {
        "id": pa.array([group.id for group in groups], pa.string()),
        "where": pa.array([where for where, _ in items], pa.string()),
        "prompt": _lists([group.prompt for group in groups], np.dtype(np.int32)),
        "candidates": _nested([group.candidates for group in groups], np.dtype(np.int32)),
    }
    columns |= {name: _lists([vars(g)[name] or () for g in groups], np.dtype(np.float64)) for name in VALUES}
    columns |= {name: _nested([vars(g)[name] or () for g in groups], np.dtype(np.float64)) for name in TOKEN_VALUES}
    return pa.record_batch(columns)


def prompts_table(items: Sequence[tuple[str, Prompt]]) -> pa.RecordBatch:
    """Store prompts, each with the place of its record, as a table."""
    prompts = [prompt for _, prompt in items]
    return pa.record_batch(
        {
            "id": pa.array([prompt.id for prompt in prompts], pa.string()),
            "where": pa.array([where for where, _ in items], pa.string()),
            "text": pa.array([prompt.text for prompt in prompts], pa.string()),
            "ids": _lists([prompt.ids for prompt in prompts], np.dtype(np.int32)),
            "chat": pa.array([_chat_json(prompt.chat) for prompt in prompts], pa.string()),
            "columns": pa.array([json.dumps(prompt.columns, ensure_ascii=False) for prompt in prompts], pa.string()),
        }
    )


def _lists(lists: Sequence[Sequence[float]], dtype: np.dtype[Any]) -> pa.ListArray:
    offsets = _offsets(lists)
    values = np.fromiter(chain.from_iterable(lists), dtype, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _nested(lists: Sequence[Sequence[Sequence[float]]], dtype: np.dtype[Any]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(_offsets(lists)), _lists(list(chain.from_iterable(lists)), dtype))


def _offsets(lists: Sequence[Sequence[object]]) -> npt.NDArray[np.int32]:
    """Return where each list begins in all of them together, and where the last ends."""
    offsets = np.zeros(len(lists) + 1, dtype=np.int32)
    np.cumsum([len(each) for each in lists], out=offsets[1:])
    return offsets


def _chat_json(chat: Chat | None) -> str | None:
    return None if chat is None else json.dumps({"messages": chat.messages, "tools": chat.tools}, ensure_ascii=False)


class _Lists:
    """A column of lists, read where it stands, without a copy."""

    def __init__(self, array: pa.ListArray) -> None:
        self.offsets = array.offsets.to_numpy()
        self._values = array.values.to_numpy()

    def at(self, number: int) -> tuple[Any, ...]:
        start, stop = self.offsets[number : number + 2]
        return tuple(self._values[start:stop].tolist())

    def all(self) -> list[tuple[Any, ...]]:
        """Return all lists, in less time than one by one."""
        values = self._values.tolist()
        return [tuple(values[start:stop]) for start, stop in pairwise(self.offsets.tolist())]


class _Nested:
    """A column of lists of lists."""

    def __init__(self, array: pa.ListArray) -> None:
        self.offsets = array.offsets.to_numpy()
        self.inner = _Lists(array.values)

    def at(self, number: int) -> tuple[tuple[Any, ...], ...]:
        start, stop = self.offsets[number : number + 2]
        return tuple(self.inner.at(k) for k in range(start, stop))

    def all(self) -> list[tuple[tuple[Any, ...], ...]]:
        """Return all lists of lists, in less time than one by one."""
        inner = self.inner.all()
        return [tuple(inner[start:stop]) for start, stop in pairwise(self.offsets.tolist())]


class ItemTable(Protocol[Item_co]):
    """Items that stand in one table. An item is made each time that it is asked for."""

    def at(self, number: int) -> Item_co:
        """Return the item with this number."""

    def all(self) -> Iterator[Item_co]:
        """Yield all items, in less time than one by one."""


class Prepared(Sequence[Item]):
    """Items in tables, one table after another.

    Attributes:
        digest: SHA-256 of all items, in order.
    """

    def __init__(
        self, tables: Sequence[pa.RecordBatch], open_table: Callable[[pa.RecordBatch], ItemTable[Item]], digest: str
    ) -> None:
        """Take tables as they are stored, and what reads items of them."""
        self.tables = tables
        self.digest = digest
        self._open = [open_table(table) for table in tables]
        self._starts = np.cumsum([0, *(len(table) for table in tables)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[Item]:
        return chain.from_iterable(table.all() for table in self._open)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        table, row = self._row(range(len(self))[index])
        return self._open[table].at(row)

    def where(self, number: int) -> str:
        """Return the place of an item's record: file and line, or data set and row."""
        table, row = self._row(number)
        return str(self.tables[table].column("where")[row].as_py())

    def _row(self, number: int) -> tuple[int, int]:
        table = int(np.searchsorted(self._starts, number, side="right")) - 1
        return table, number - int(self._starts[table])


class PreparedGroups(Sequence[Group]):
    """Groups in tables, with the lengths of all of them, and reference log-probs that were computed later.

    Attributes:
        digest: their `data_digest`.
        lengths: numbers of tokens.
    """

    def __init__(self, stored: Prepared[Group], logprobs: npt.NDArray[np.float64] | None = None) -> None:
        """Take stored groups; `logprobs` [C], one per candidate of all groups, stand in for those that lack them."""
        self._stored = stored
        self._logprobs = logprobs
        self.digest = stored.digest
        self.lengths = _stored_lengths(stored.tables)
        self._starts = self.lengths.starts

    def __len__(self) -> int:
        return len(self._stored)

    @overload
    def __getitem__(self, index: int) -> Group: ...

    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...

    def __getitem__(self, index: int | slice) -> Group | list[Group]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        group = self._stored[number]
        if self._logprobs is None or group.reference_logprobs is not None:
            return group
        start, stop = self._starts[number : number + 2]
        return replace(group, reference_logprobs=tuple(self._logprobs[start:stop].tolist()))

    def where(self, number: int) -> str:
        """Return the place of a group's record: file and line, or data set and row."""
        return self._stored.where(number)

    def lacking_logprobs(self) -> list[int]:
        """List the numbers of the groups without stored reference log-probs."""
        sizes = np.concatenate([np.diff(table.column("reference_logprobs").offsets) for table in self._stored.tables])
        return [int(number) for number in np.flatnonzero(sizes == 0)]

    def with_logprobs(self, numbers: Sequence[int], logprobs: Sequence[Sequence[float]]) -> PreparedGroups:
        """Return the groups with the K reference log-probs of those with these numbers, which lack them."""
        values = np.full(len(self.lengths.candidates), np.nan)
        for number, given in zip(numbers, logprobs, strict=True):
            values[self._starts[number] : self._starts[number + 1]] = given
        return PreparedGroups(self._stored, values)


class GroupTable:
    """Groups in one table of `groups_table`."""

    def __init__(self, table: pa.RecordBatch) -> None:
        """Open the table; nothing is copied."""
        self._table = table
        self._ids = table.column("id")
        self._prompts, self._candidates = _Lists(table.column("prompt")), _Nested(table.column("candidates"))
        self._further: dict[str, _Lists | _Nested] = {name: _Lists(table.column(name)) for name in VALUES}
        self._further |= {name: _Nested(table.column(name)) for name in TOKEN_VALUES}

    def at(self, number: int) -> Group:
        """Return the group with this number."""
        further: dict[str, Any] = {name: column.at(number) or None for name, column in self._further.items()}
        return Group(self._ids[number].as_py(), self._prompts.at(number), self._candidates.at(number), **further)

    def all(self) -> Iterator[Group]:
        """Yield all groups."""
        names, columns = list(self._further), [column.all() for column in self._further.values()]
        texts = zip(self._ids.to_pylist(), self._prompts.all(), self._candidates.all(), strict=True)
        for (id, prompt, candidates), *values in zip(texts, *columns, strict=True):
            further: dict[str, Any] = {name: value for name, value in zip(names, values, strict=True) if value}
            yield Group(id, prompt, candidates, **further)

    def digest_texts(self) -> Iterator[str]:
        """Yield the `digest_text` of every group, in a third of the time that it takes to make the group."""
        prompts = _tuple_texts(self._table.column("prompt"))
        inner, ends = self._table.column("candidates"), pairwise(self._candidates.offsets.tolist())
        each = _tuple_texts(inner.values)
        candidates = [_tuple_text(", ".join(each[start:stop]), stop - start) for start, stop in ends]
        further = [self._further[name].all() for name in FURTHER_DIGESTED]
        texts = zip(self._ids.to_pylist(), prompts, candidates, self._further["rewards"].all(), strict=True)
        for (id, prompt, answers, rewards), *values in zip(texts, *further, strict=True):
            named = [pair for pair in zip(FURTHER_DIGESTED, values, strict=True) if pair[1]]
            yield digest_text(id, prompt, answers, rewards or None, named)


def _tuple_texts(lists: pa.ListArray) -> list[str]:
    """Write lists of integers as the text of tuples, without making Python's integers."""
    joined = pc.binary_join(lists.cast(pa.list_(pa.string())), ", ").to_pylist()
    return [_tuple_text(*each) for each in zip(joined, np.diff(lists.offsets).tolist(), strict=True)]


def _tuple_text(items: str, count: int) -> str:
    return f"({items},)" if count == 1 else f"({items})"


_DIGESTED_TOGETHER = 128
"""Groups whose texts are made together for a digest."""


def groups_digest(tables: Sequence[pa.RecordBatch]) -> str:
    """Compute the `data_digest` of the groups in tables."""
    parts = (part for table in tables for part in _parts(table))
    return digest_texts(chain.from_iterable(GroupTable(part).digest_texts() for part in parts))


def _parts(table: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Copy a table in small parts: texts of all its integers would take hundreds of MB."""
    for start in range(0, len(table), _DIGESTED_TOGETHER):
        yield table.take(pa.array(range(start, min(start + _DIGESTED_TOGETHER, len(table)))))


class PromptTable:
    """Prompts in one table of `prompts_table`."""

    def __init__(self, table: pa.RecordBatch) -> None:
        """Open the table; nothing is copied."""
        self._table = table
        self._token_ids = _Lists(table.column("ids"))

    def at(self, number: int) -> Prompt:
        """Return the prompt with this number."""
        id, text, chat, columns = (
            self._table.column(name)[number].as_py() for name in ("id", "text", "chat", "columns")
        )
        return Prompt(id, text, self._token_ids.at(number), _chat(chat), json.loads(columns))

    def all(self) -> Iterator[Prompt]:
        """Yield all prompts."""
        return map(self.at, range(len(self._table)))


def _chat(stored: str | None) -> Chat | None:
    if stored is None:
        return None
    parts = json.loads(stored)
    return Chat(tuple(parts["messages"]), tuple(parts["tools"]))


def prompts_digest(tables: Sequence[pa.RecordBatch]) -> str:
    """Compute the SHA-256 of all that draws of candidates and their records depend on, in order."""
    prompts = chain.from_iterable(PromptTable(table).all() for table in tables)
    return digest_texts(repr((each.id, each.text, each.ids, each.chat, each.columns)) for each in prompts)


def prompt_lengths(prompts: Prepared[Prompt]) -> npt.NDArray[np.int64]:
    """Return the numbers of tokens of all prompts, without reading them."""
    return _joined([np.diff(table.column("ids").offsets) for table in prompts.tables])


def _stored_lengths(tables: Sequence[pa.RecordBatch]) -> GroupLengths:
    columns = [(table.column("prompt"), table.column("candidates")) for table in tables]
    return GroupLengths(
        prompts=_joined([np.diff(prompts.offsets) for prompts, _ in columns]),
        counts=_joined([np.diff(candidates.offsets) for _, candidates in columns]),
        candidates=_joined([np.diff(candidates.values.offsets) for _, candidates in columns]),
    )


def _joined(parts: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)
