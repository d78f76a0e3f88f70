"""From a document to a frozen configuration; what pydantic finds wrong becomes one ConfigError line."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import ValidationError

from exo_megatron.config.checks import find_problems
from exo_megatron.config.describe import describe_key, describe_keys, nearest, section_at
from exo_megatron.config.document import Document, Key, show
from exo_megatron.config.sections import Section
from exo_megatron.config.stages import StageConfig
from exo_megatron.errors import ConfigError

SectionT = TypeVar("SectionT", bound=Section)
StageT = TypeVar("StageT", bound=StageConfig)


def validate(section: type[SectionT], document: Document) -> SectionT:
    """The document as a configuration class. Nothing is coerced but an integer to a number and a text to a path.

    Raises ConfigError for the first flaw (unknown keys before others, because a misspelt key is also a missing one),
    with the number of further ones.
    """
    data = {**document.data, **_complete_sections(section, document)}
    try:
        return section.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise _explain(error, section, document) from None


def validate_stage(section: type[StageT], document: Document) -> StageT:
    """`validate`, and then what keys say together. The first contradiction is a ConfigError."""
    config = validate(section, document)
    for flaw in find_problems(config):
        raise ConfigError(document.where(flaw.key), flaw.problem, expected=flaw.expected, fix=flaw.fix)
    return config


def validate_partial(section: type[Section], document: Document) -> None:
    """`validate` for a part of a section: keys may be missing, and nothing is returned."""
    try:
        section.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        if any(flaw["type"] != "missing" for flaw in error.errors(include_url=False)):
            raise _explain(error, section, document, skip="missing") from None


def _complete_sections(section: type[Section], document: Document) -> dict[str, Any]:
    """The sections given in part, with what this class sets differently from the section's own defaults.

    `sft` has optimizer.lr 1e-5 by default, and setting optimizer.weight_decay must not bring back the 1e-6 of others.
    """
    completed = {}
    for name, info in section.model_fields.items():
        given = document.data.get(name)
        if isinstance(given, dict) and isinstance(info.default, Section):
            completed[name] = {**info.default.model_dump(mode="json", exclude_unset=True), **given}
    return completed


def _explain(
    error: ValidationError, section: type[Section], document: Document, *, skip: str | None = None
) -> ConfigError:
    """One ConfigError for pydantic's list of errors, those of the type `skip` left out."""
    flaws = [flaw for flaw in error.errors(include_url=False) if flaw["type"] != skip]
    flaws.sort(key=lambda flaw: flaw["type"] != "extra_forbidden")
    key: Key = flaws[0]["loc"]
    problem, expected, fix = _explain_flaw(flaws[0]["type"], key, flaws[0]["input"], section, document.name(key))
    if len(flaws) > 1:
        problem += f" (and {len(flaws) - 1} more)"
    return ConfigError(document.where(key), problem, expected=expected, fix=fix)


def _explain_flaw(kind: str, key: Key, value: Any, section: type[Section], name: str) -> tuple[str, str, str]:
    """Problem, expectation and fix. name: the key as the user writes it."""
    if kind == "extra_forbidden":
        return _unknown(key, section)
    expected = describe_key(section, key)
    if kind == "missing":
        return "missing", expected, f"set it in the file, or pass {name}=VALUE"
    return f"got {show(value)}", expected, _fix_value(kind, value, expected, name)


def _unknown(key: Key, section: type[Section]) -> tuple[str, str, str]:
    *around, name = key
    parent = section_at(section, tuple(around))
    known = [] if parent is None else list(parent.model_fields)
    near = nearest(str(name), known)
    if near is None:
        deeper = [each.key for each in describe_keys(section) if each.key.split(".")[-1] == name]
        fix = f"write {deeper[0]}" if deeper else "remove it"
    else:
        fix = f"write {near}"
    return f"unknown key {str(name)!r}", "one of " + ", ".join(known), fix


def _fix_value(kind: str, value: Any, expected: str, name: str) -> str:
    match kind, value:
        case "literal_error", str():
            near = nearest(value, expected.removeprefix("one of ").split(", "))
            return f"write {near}" if near else f"change {name}"
        case "int_type" | "float_type" | "bool_type", str() if _is_plain(value, kind):
            return "remove the quotes"
        case "bool_type", "yes" | "on" | "no" | "off":
            return "write " + ("true" if value in ("yes", "on") else "false")
        case "int_type" | "int_from_float", float() if value.is_integer():
            return f"write {int(value)}"
        case "string_type" | "path_type", int() | float() if not isinstance(value, bool):
            return "put it in quotes"
        case "model_type", None:
            return "write its keys below it, or remove it"
    return f"change {name}"


def _is_plain(text: str, kind: str) -> bool:
    """Whether the text is of the wanted kind once its quotes are gone."""
    if kind == "bool_type":
        return text.lower() in ("true", "false")
    try:
        (int if kind == "int_type" else float)(text)
    except ValueError:
        return False
    return True
