"""Typed access to HF's config.json. Missing, wrong and unsupported values are errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exo_megatron.errors import CheckpointError

_FIX = "correct config.json; a model that needs this value cannot be converted"


@dataclass(frozen=True)
class HfConfig:
    """The values of a config.json; `where` is its path.

    A null means the default, like an absent key, except where a method says otherwise. Methods that
    read a value raise CheckpointError if it is of another kind.
    """

    values: Mapping[str, Any]
    where: str

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = 2**31 - 1) -> int:
        """Read a whole number from `minimum` to `maximum`."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            what = "a positive whole number" if minimum == 1 else f"a whole number of at least {minimum}"
            raise self.unsupported(key, value, what)
        if value > maximum:
            raise self.unsupported(key, value, f"at most {maximum:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Read a positive finite number."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.unsupported(key, value, "a positive number")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """Read a list of `count` positive finite numbers."""
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) != count:
            raise self.unsupported(key, value, f"a list of {count} numbers")
        items = HfConfig({f"{key}[{index}]": item for index, item in enumerate(value)}, self.where)
        return tuple(items.number(each) for each in items.values)

    def optional_integer(self, key: str, default: int | None) -> int | None:
        """Read a positive whole number, or None for null; an absent key is the default."""
        return self.integer(key, default) if self.values.get(key, default) is not None else None

    def optional_number(self, key: str, default: float | None) -> float | None:
        """Read a positive finite number, or None for null; an absent key is the default."""
        return self.number(key, default) if self.values.get(key, default) is not None else None

    def flag(self, key: str, default: bool) -> bool:
        """Read true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.unsupported(key, value, "true or false")
        return value

    def require(self, key: str, allowed: tuple[object, ...], why: str = "") -> None:
        """Accept a key only if it is absent, null, or has one of the `allowed` values."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise self.unsupported(key, value, " or ".join(repr(item) for item in allowed) or "null", why)

    def section(self, key: str) -> HfConfig:
        """Read a nested mapping, empty if it is absent or null."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.unsupported(key, value, "a mapping")
        return HfConfig(value, f"{self.where}: {key}")

    def unsupported(self, key: str, value: object, expected: str, why: str = "") -> CheckpointError:
        """Make the error for a value that cannot be converted.

        `why` is the reason, where it is not obvious.
        """
        return CheckpointError(
            self.where,
            (f"{key} is {value!r}" if key in self.values else f"{key} is missing") + (f": {why}" if why else ""),
            expected=f"{key}: {expected}",
            fix=_FIX,
        )

    def _get(self, key: str, default: object) -> Any:
        value = self.values.get(key)
        return default if value is None else value
