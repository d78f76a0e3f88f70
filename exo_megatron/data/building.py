"""Records in our own fields as prompts and candidate groups: their texts are tokenised together, and all is checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from exo_megatron.config.sections import DataConfig
from exo_megatron.data.entries import SourceEntry, read_record
from exo_megatron.data.reading import Interpreter
from exo_megatron.data.records import SourceRecord
from exo_megatron.data.tally import Tally
from exo_megatron.data.text import Answer, Text
from exo_megatron.data.tokenizer import EncodedGroup, Tokenizer
from exo_megatron.errors import DataError, EmptyError, OverlongAnswer, OverlongPrompt

Item = TypeVar("Item")


@dataclass(frozen=True)
class Draft(Generic[Item]):
    """An item that waits for the token ids of its texts.

    Attributes:
        prompt, answers: its texts, the answers by their names in messages.
        finish: makes the item of the ids of the prompt and of the answers. Raises DataError.
    """

    prompt: Text
    answers: Mapping[str, Answer]
    finish: Callable[[EncodedGroup], Item]


class Builder(Protocol[Item]):
    """A conversion of records in our own fields into items of one kind."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of their texts."""

    def draft(self, record: SourceRecord, tally: Tally) -> Draft[Item] | Item:
        """Return an item, or a draft of it if it has texts to tokenise. Raises DataError."""

    def note(self, where: str, item: Item, tally: Tally) -> None:
        """Count what a user should know of a finished item."""


def build_items(
    entries: Sequence[SourceEntry], interpreter: Interpreter, builder: Builder[Item]
) -> tuple[list[tuple[str, Item]], Tally]:
    """Make items of the entries of a share of a source.

    Returns:
        Items in the order of the entries, each with the place of its record, and what was counted.
        Records that cannot be used are counted and left out.
    """
    tally = Tally()
    drafts: list[tuple[int, SourceRecord, Draft[Item] | Item]] = []
    for number, entry in enumerate(entries):
        for record in convert_entry(entry, number, interpreter, tally):
            try:
                drafts.append((number, record, builder.draft(record, tally)))
            except DataError as error:
                tally.add_flaw(error, number)
    waiting = [draft for _, _, draft in drafts if isinstance(draft, Draft)]
    encoded = iter(builder.tokenizer.encode_batch([(draft.prompt, list(draft.answers.values())) for draft in waiting]))
    items: list[tuple[str, Item]] = []
    for number, record, draft in drafts:
        remarks = dict(tally.remarks)
        try:
            item = _finished(record, draft, next(encoded)) if isinstance(draft, Draft) else draft
        except DataError as error:
            tally.add_flaw(error, number)
            tally.remarks = Counter(remarks)  # those are about items alone
        else:
            items.append((record.where, item))
            builder.note(record.where, item, tally)
    tally.items = len(items)
    return items, tally


def convert_entry(entry: SourceEntry, number: int, interpreter: Interpreter, tally: Tally) -> list[SourceRecord]:
    """Return the records that an entry becomes, none of one that cannot be used. Both are counted."""
    read = tally.seen.read
    try:
        return interpreter.convert(read_record(entry), tally.seen)
    except DataError as error:
        tally.add_flaw(error, number)
        return []
    finally:
        tally.seen.read = read + 1  # also one that is no record


def _finished(record: SourceRecord, draft: Draft[Item], encoded: EncodedGroup | DataError) -> Item:
    if isinstance(encoded, DataError):
        # The tokenizer does not know the place of the record.
        problem = f"{encoded.problem} ({encoded.where})"
        raise DataError(record.where, problem, expected=encoded.expected, fix=encoded.fix)
    return draft.finish(encoded)


@dataclass(frozen=True)
class Limits:
    """Checks of token ids against the limits of `data` and the tokenizer."""

    tokenizer: Tokenizer
    config: DataConfig

    def prompt(self, record: SourceRecord, ids: Sequence[int], tally: Tally | None = None) -> tuple[int, ...]:
        """Return the checked ids of a prompt, with its beginning cut off if `data.on_overlong` says so.

        That is counted in `tally`; without one the ids are kept or refused as they are.
        """
        limit = self.config.max_prompt_tokens
        if not ids:
            raise EmptyError(record.where, "'prompt' is empty", expected="at least one token", fix="remove the record")
        if len(ids) > limit and tally is not None and self.config.on_overlong == "truncate_prompt_left":
            ids = _cut_on_the_left(ids, self.tokenizer.prefix_ids, limit)
            tally.remarks[f"prompts cut on the left to {limit} tokens (data.max_prompt_tokens)"] += 1
        return self._checked(record, "prompt", ids, limit, "data.max_prompt_tokens", OverlongPrompt)

    def completion(self, record: SourceRecord, name: str, ids: Sequence[int]) -> tuple[int, ...]:
        """Return the checked ids of a completion."""
        limit = self.config.max_completion_tokens
        return self._checked(record, name, ids, limit, "data.max_completion_tokens", OverlongAnswer)

    def _checked(
        self, record: SourceRecord, name: str, ids: Sequence[int], limit: int, key: str, overlong: type[DataError]
    ) -> tuple[int, ...]:
        if len(ids) > limit:
            raise overlong(
                record.where,
                f"{name!r} of record {record.id!r} has {len(ids)} tokens",
                expected=f"at most {limit} ({key}, special tokens included)",
                fix=f"raise {key}, or shorten or remove the record",
            )
        if max(ids) >= self.tokenizer.vocab_size:
            raise DataError(
                record.where,
                f"{name!r} has token id {max(ids)}",
                expected=f"ids below {self.tokenizer.vocab_size}, which tokenizer {self.tokenizer.path} and model have",
                fix="use the tokenizer that made the file (data.tokenizer), or remove what the model has no token for",
            )
        return tuple(ids)


def _cut_on_the_left(ids: Sequence[int], prefix: Sequence[int], limit: int) -> list[int]:
    """Return the last `limit` ids, behind the prefix (BOS) if they began with it and it leaves room for others."""
    kept = list(prefix) if list(ids[: len(prefix)]) == list(prefix) and len(prefix) < limit else []
    return [*kept, *ids[len(ids) - limit + len(kept) :]]
