"""Dotted settings of the command line: `optimizer.lr=1e-5`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from exo_megatron.config.document import COMMAND_LINE, Document, Key, Origin, dotted, parse_value, show
from exo_megatron.errors import ConfigError


@dataclass(frozen=True)
class Override:
    """One setting: where it goes, its value (parsed as YAML), and the origins of the entries inside the value."""

    key: Key
    value: Any
    origins: dict[Key, Origin]


def parse_override(text: str) -> Override:
    """Read `a.b.c=value`. The value may be any YAML value, lists and mappings in their one-line form included."""
    name, sign, value_text = text.partition("=")
    key: Key = tuple(part.strip() for part in name.split("."))
    if not sign or not all(key):
        raise ConfigError(
            COMMAND_LINE, f"got {text!r}", expected="key.path=value", fix="write for example optimizer.lr=1e-5"
        )
    value, inner = parse_value(value_text, f"{COMMAND_LINE}: {dotted(key)}", lambda line: COMMAND_LINE, above=key)
    return Override(key, value, {(): Origin(COMMAND_LINE, dotted(key)), **inner})


def apply_override(document: Document, override: Override) -> None:
    """Put the value into the document in place; sections on the way that are absent or null are made."""
    section: Any = document.data
    shown = override.origins[()].key
    for depth, part in enumerate(override.key[:-1], start=1):
        inner = section.get(part)
        if inner is None:
            inner = section[part] = {}
            above = shown.rsplit(".", len(override.key) - depth)[0]
            document.origins[override.key[:depth]] = Origin(COMMAND_LINE, above)
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{COMMAND_LINE}: {shown}",
                f"{document.name(override.key[:depth])} is {show(inner)}, not a section",
                expected="the path of a key through sections",
                fix=f"give {document.name(override.key[:depth])} as a whole",
            )
        section = inner
    document.put(override.key, override.value, override.origins)
