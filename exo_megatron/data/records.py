"""A record as it was read, and checks of its fields."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exo_megatron.errors import DataError

LARGEST_NUMBER = 1e12
"""Rewards and log-probs beyond it are mistakes, which would make losses infinite far from their cause."""


@dataclass(frozen=True)
class SourceRecord:
    """One record as it was read.

    Attributes:
        where: file and line, or data set and row, for messages.
        id: the record's own "id", or its place, which does not change between runs.
        fields: its values without nulls, which columnar data sets use for absent values.
    """

    where: str
    id: str
    fields: Mapping[str, Any]


Fields = Mapping[str, Any]


def require(where: str, fields: Fields, name: str) -> Any:
    """Return the value of a field.

    Raises DataError, which suggests fields with similar names, if it is missing.
    """
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
    """Return a string field. Raises DataError for another value."""
    value = require(where, fields, name)
    if not isinstance(value, str):
        raise wrong_type(where, name, value, "a string")
    return unicode_text(where, name, value)


def boolean(where: str, fields: Fields, name: str) -> bool:
    """Return a true/false field. Raises DataError for another value."""
    value = require(where, fields, name)
    if not isinstance(value, bool):
        raise wrong_type(where, name, value, "true or false")
    return value


def finite_number(where: str, fields: Fields, name: str) -> float:
    """Return a number that is neither NaN nor infinite. Raises DataError for another value."""
    return _finite(where, name, require(where, fields, name))


def finite_numbers(where: str, fields: Fields, name: str) -> tuple[float, ...]:
    """Return a list of finite numbers. Raises DataError for another value."""
    values = list_field(where, fields, name, "a list of numbers")
    return tuple(_finite(where, f"{name}[{k}]", value) for k, value in enumerate(values))


def finite_number_lists(where: str, fields: Fields, name: str) -> tuple[tuple[float, ...], ...]:
    """Return a list of lists of finite numbers. Raises DataError for another value."""
    lists = dict(enumerate(list_field(where, fields, name, "a list of lists of numbers")))
    return tuple(finite_numbers(f"{where} {name}", {str(k): values}, str(k)) for k, values in lists.items())


def token_ids(where: str, fields: Fields, name: str) -> tuple[int, ...]:
    """Return a non-empty list of token ids >= 0. Raises DataError for another value."""
    values = list_field(where, fields, name, "a list of token ids")
    if not values or not all(type(value) is int and value >= 0 for value in values):
        raise wrong_type(where, name, values, "a non-empty list of token ids >= 0")
    return tuple(values)


def object_list(where: str, fields: Fields, name: str) -> list[Fields]:
    """Return a non-empty list of JSON objects. Raises DataError for another value."""
    values = list_field(where, fields, name, "a list of objects")
    if not values or not all(isinstance(value, Mapping) for value in values):
        raise wrong_type(where, name, values, "a non-empty list of objects")
    return list(values)


def wrong_type(where: str, name: str, value: object, expected: str) -> DataError:
    """Make the error for a value of the wrong kind, which is shown shortened."""
    shown = repr(value)
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return DataError(where, f"{name!r} is {shown}", expected=expected, fix="correct the record")


def unicode_text(where: str, name: str, value: str) -> str:
    """Return the text. Raises DataError if it holds half of a surrogate pair.

    JSON can write that, but no tokenizer can read it.
    """
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


def list_field(where: str, fields: Fields, name: str, expected: str) -> list[Any]:
    """Return a list. Raises DataError for another value; `expected` says what it should be."""
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
    if abs(number) > LARGEST_NUMBER:
        raise wrong_type(where, name, value, f"a number from {-LARGEST_NUMBER:g} to {LARGEST_NUMBER:g}")
    return number
