"""Counts over the records of a data source: what they are, what is wrong with some, what a user should know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from exo_megatron.data.reading import Seen
from exo_megatron.data.stored_logprobs import describe_temperatures
from exo_megatron.errors import (
    DataError,
    EmptyError,
    EqualRewards,
    EqualTexts,
    OverlongAnswer,
    OverlongPrompt,
    StoredLogprobsError,
    TieError,
)

_ERRORS = (
    OverlongPrompt,
    OverlongAnswer,
    EmptyError,
    EqualTexts,
    EqualRewards,
    StoredLogprobsError,
    DataError,
)
ERRORS = {error.kind: error for error in _ERRORS}
"""What can be wrong with a record, by the words of reports."""


@dataclass
class Flaw:
    """Records with one kind of error: their number, and the first with its place among all records."""

    count: int
    place: int
    first: DataError


@dataclass(frozen=True)
class Verdicts:
    """The fate of records that cannot be used: `data.on_invalid`, `data.on_overlong` and `ties`."""

    invalid: Literal["error", "skip"] = "error"
    overlong: Literal["error", "skip", "truncate_prompt_left"] = "error"
    ties: Literal["error", "skip"] = "error"

    def leaves_out(self, error: DataError) -> bool:
        """Tell whether records with this error are left out and the work goes on.

        Log-probs of another source are no flaw of a record: a setting or a file is wrong.
        """
        if isinstance(error, StoredLogprobsError):
            return False
        if isinstance(error, OverlongPrompt | OverlongAnswer) and self.overlong != "truncate_prompt_left":
            return self.overlong == "skip"
        return self.invalid == "skip" or (isinstance(error, TieError) and self.ties == "skip")


@dataclass
class Tally:
    """Counts that go on over shares of a source, in the order of its records.

    Attributes:
        seen: what the records were taken for.
        items: groups or prompts made of them.
        flaws: records that cannot be used, by kind.
        remarks: groups that can, with something that a user should know, by kind.
        sizes: records with a list of candidates, by its length.
        temperatures: records of stored candidates, by the temperature that they were drawn at; None
            if the record does not say.
        fields: per field with log-probs of single tokens, the places of the first group with it and
            of the first without it; None for no such group.
    """

    seen: Seen = field(default_factory=Seen)
    items: int = 0
    flaws: dict[str, Flaw] = field(default_factory=dict)
    remarks: Counter[str] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)
    temperatures: Counter[float | None] = field(default_factory=Counter)
    fields: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)

    def add_flaw(self, error: DataError, place: int) -> None:
        """Count a record that cannot be used. `place` is its number."""
        flaw = self.flaws.setdefault(error.kind, Flaw(0, place, error))
        flaw.count += 1
        if place < flaw.place:
            flaw.place, flaw.first = place, error

    def add_field(self, name: str, where: str, *, present: bool) -> None:
        """Note that the group at `where` has a field with log-probs of single tokens, or has not."""
        having, lacking = self.fields.get(name, (None, None))
        self.fields[name] = (having or where, lacking) if present else (having, lacking or where)

    def add(self, other: Tally) -> None:
        """Add the counts of the share that follows, whose places count from its own first record."""
        for kind, flaw in other.flaws.items():
            mine = self.flaws.setdefault(kind, Flaw(0, self.seen.read + flaw.place, flaw.first))
            mine.count += flaw.count
        self.seen.add(other.seen)
        self.items += other.items
        self.remarks.update(other.remarks)
        self.sizes.update(other.sizes)
        self.temperatures.update(other.temperatures)
        for name, (having, lacking) in other.fields.items():
            before = self.fields.get(name, (None, None))
            self.fields[name] = (before[0] or having, before[1] or lacking)

    @property
    def _total(self) -> int:
        """The number of records, used or not; of a conversation, of which each answer is one, that of its answers."""
        return self.items + sum(flaw.count for flaw in self.flaws.values())

    def judge(self, source: str, verdicts: Verdicts) -> None:
        """Raise the first error that is not to be passed over, with the numbers of all; and if nothing is left.

        Raises DataError.
        """
        fatal = [flaw for flaw in self.flaws.values() if not verdicts.leaves_out(flaw.first)]
        if fatal:
            raise self._with_counts(min(fatal, key=lambda flaw: flaw.place).first)
        if not self.items:
            raise DataError(
                source,
                f"has no record that can be used: {self.describe_flaws()}",
                expected="at least one",
                fix="correct the data, or what is to be left out (data.on_invalid, data.on_overlong, ties)",
            )
        for name, (having, lacking) in self.fields.items():
            if having is not None and lacking is not None:
                raise DataError(
                    lacking,
                    f"has no {name!r}, but {having} has",
                    expected="the field in every record, or in none",
                    fix=f"add {name!r} to the record, or remove it from all",
                )

    def _with_counts(self, first: DataError) -> DataError:
        """Return the first error with the numbers of all others, and the way to leave them out."""
        total = self._total - self.items
        if total == 1:
            return first
        fix = first.fix
        if isinstance(first, OverlongPrompt | OverlongAnswer):
            fix += ", or set data.on_overlong=skip to leave out all such records"
        elif not isinstance(first, TieError | StoredLogprobsError):
            fix += ", or set data.on_invalid=skip to leave out all such records"
        told = f"{first.problem} (of {self._total} records {total} cannot be used: {self.describe_flaws()})"
        return type(first)(first.where, told, expected=first.expected, fix=fix)

    def describe_flaws(self) -> str:
        """Describe how many records cannot be used, by kind."""
        return ", ".join(f"{flaw.count} {kind}" for kind, flaw in self.flaws.items())

    def describe(self, path: str, *, first: int | None, temperature: float | None) -> Iterator[str]:
        """Describe what of the records became no part of a group, or is doubtful.

        Args:
            path: the data source.
            first: the number of first candidates that are read; None for all.
            temperature: that of the loss; None if there is none.
        """
        if temperature is not None and self.temperatures:
            line = describe_temperatures(self.temperatures, Path(path), temperature)
            yield from () if line is None else (line,)
        larger = {size: number for size, number in self.sizes.items() if first is not None and size > first}
        if larger:
            least, most = min(larger), max(larger)
            size = f"{most}" if least == most else f"{least} to {most}"
            yield f"the first {first} of {size} candidates in {_share(sum(larger.values()), self.seen.made)} records"
        for kind, flaw in self.flaws.items():
            yield f"{_share(flaw.count, self._total)} records left out: {kind} (the first: {_brief(flaw.first)})"
        for kind, number in self.remarks.items():
            yield f"{_share(number, self.items)} {kind}"

    def as_json(self) -> dict[str, Any]:
        """Return the counts as JSON values, which `from_json` reads."""
        return {
            "records": self.seen.read,
            "records_in_our_fields": self.seen.made,
            "layouts": [[name, list(used), number] for (name, used), number in self.seen.layouts.items()],
            "columns": sorted(self.seen.columns),
            "items": self.items,
            "left_out": {
                kind: {"count": flaw.count, "first_record": flaw.place, **_error_as_json(flaw.first)}
                for kind, flaw in self.flaws.items()
            },
            "remarks": dict(self.remarks),
            "candidates_per_record": list(map(list, self.sizes.items())),
            "temperatures": list(map(list, self.temperatures.items())),
            "fields": {name: list(places) for name, places in self.fields.items()},
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Tally:
        """Read counts that `as_json` wrote."""
        layouts = Counter({(name, tuple(used)): number for name, used, number in stored["layouts"]})
        return cls(
            seen=Seen(stored["records"], stored["records_in_our_fields"], layouts, set(stored["columns"])),
            items=stored["items"],
            flaws={
                kind: Flaw(flaw["count"], flaw["first_record"], _error_from_json(kind, flaw))
                for kind, flaw in stored["left_out"].items()
            },
            remarks=Counter(stored["remarks"]),
            sizes=Counter(dict(stored["candidates_per_record"])),
            temperatures=Counter(dict(stored["temperatures"])),
            fields={name: (having, lacking) for name, (having, lacking) in stored["fields"].items()},
        )


def _error_as_json(error: DataError) -> dict[str, str]:
    return {"where": error.where, "problem": error.problem, "expected": error.expected, "fix": error.fix}


def _error_from_json(kind: str, stored: Mapping[str, str]) -> DataError:
    return ERRORS[kind](stored["where"], stored["problem"], expected=stored["expected"], fix=stored["fix"])


def _brief(error: DataError) -> str:
    return f"{error.where}: {error.problem}"


def _share(count: int, total: int) -> str:
    return f"{count}" if count == total else f"{count} of {total}"
