"""Typed access to HF's config.json: what is missing, of another type or not supported is an error that names it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exo_megatron.errors import CheckpointError
from exo_megatron.models.spec import RotaryScaling


@dataclass(frozen=True)
class HfConfig:
    """The values of a config.json; `where` is its path."""

    values: Mapping[str, Any]
    where: str

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.unsupported(key, value, "a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.unsupported(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.unsupported(key, value, "true or false")
        return value

    def require(self, key: str, allowed: tuple[object, ...]) -> None:
        """Accept a key only if it is absent, null, or has one of these values."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise self.unsupported(key, value, " or ".join(repr(item) for item in allowed))

    def section(self, key: str) -> HfConfig:
        """A nested mapping; empty if absent or null."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.unsupported(key, value, "a mapping")
        return HfConfig(value, f"{self.where}: {key}")

    def unsupported(self, key: str, value: object, expected: str) -> CheckpointError:
        """The error for a value that cannot be converted."""
        return CheckpointError(
            self.where,
            f"{key} is {value!r}" if key in self.values else f"{key} is missing",
            expected=f"{key}: {expected}",
            fix="correct config.json; a model that needs this value cannot be converted",
        )

    def _get(self, key: str, default: object) -> Any:
        value = self.values.get(key)
        return default if value is None else value


def read_rotary(config: HfConfig, *, default_base: float) -> tuple[float, RotaryScaling | None]:
    """Rotary base and scaling, from transformers 5 (`rope_parameters`) or 4 (`rope_theta` and `rope_scaling`)."""
    parameters, scaling = config.section("rope_parameters"), config.section("rope_scaling")
    if parameters.values and scaling.values and dict(parameters.values) != dict(scaling.values):
        raise config.unsupported("rope_scaling", scaling.values, "one of rope_parameters and rope_scaling, not both")
    rope = parameters if parameters.values else scaling
    base = rope.number("rope_theta") if "rope_theta" in rope.values else config.number("rope_theta", default_base)
    for section in (rope, config):
        section.require("partial_rotary_factor", (1, 1.0))
    return base, _read_scaling(rope)


def _read_scaling(rope: HfConfig) -> RotaryScaling | None:
    key = "rope_type" if "rope_type" in rope.values else "type"
    kind = rope.values.get(key)
    if kind in (None, "default"):
        return None
    if kind == "linear":
        return RotaryScaling(kind="linear", factor=rope.number("factor"))
    if kind == "llama3":
        return RotaryScaling(
            kind="llama3",
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_positions=rope.integer("original_max_position_embeddings"),
        )
    raise rope.unsupported(key, kind, "default, linear or llama3")
