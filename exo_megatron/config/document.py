"""YAML text as plain values with the places where they were written, and values as YAML text.

The scalars are those of YAML 1.2: `1e-6` is a number (PyYAML alone reads it as text), and `no`,
`on`, `010`, `1:30` and dates have no special meaning. The values are plain Python values, whatever
tags the text holds.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from exo_megatron.config.sections import Section
from exo_megatron.config.yaml_text import MOST_VALUES, TAG, Dumper, Loader, TooMuch
from exo_megatron.errors import ConfigError

Key = tuple[str | int, ...]
"""Names of mapping entries and indices of list items, from the top of the document."""

COMMAND_LINE = "command line"

LARGEST_FILE = 2**20
"""Bytes of a configuration file."""


@dataclass(frozen=True)
class Origin:
    """The place where a value was written.

    It is a file and line or the command line, with the dotted key that was used there.
    """

    source: str
    key: str


@dataclass
class Document:
    """Plain values and the origin of every entry. `origins[()]` is that of the whole document."""

    data: dict[str, Any]
    origins: dict[Key, Origin] = field(default_factory=dict)

    def where(self, key: Key) -> str:
        """Return `file:line: dotted.key` of an entry.

        An entry that was not written gets the line of the nearest section around it.
        """
        origin, name = self._nearest(key)[0], self.name(key)
        return f"{origin.source}: {name}" if name else origin.source

    def name(self, key: Key) -> str:
        """Return the dotted key under which the user finds or sets an entry."""
        origin, depth = self._nearest(key)
        return ".".join([part for part in (origin.key, dotted(key[depth:])) if part])

    def _nearest(self, key: Key) -> tuple[Origin, int]:
        depth = next(n for n in range(len(key), -1, -1) if key[:n] in self.origins)
        return self.origins[key[:depth]], depth

    def put(self, key: Key, value: Any, origins: dict[Key, Origin]) -> None:
        """Replace the entry `key` by `value`, and its origins by those inside `value`.

        The sections above the entry must exist.
        """
        parent: Any = self.data
        for part in key[:-1]:
            parent = parent[part]
        parent[key[-1]] = value
        self.forget(key)
        self.origins.update({key + inner: origin for inner, origin in origins.items()})

    def forget(self, key: Key) -> None:
        """Drop the origins of an entry and of everything inside it."""
        for known in [known for known in self.origins if known[: len(key)] == key]:
            del self.origins[known]


def read_document(file: Path) -> Document:
    """Read a configuration file, which must hold one YAML mapping.

    Raises ConfigError, which names file and line, for any flaw.
    """
    try:
        _check_file(file)
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            str(file), f"cannot be read ({error.strerror})", expected="a YAML file", fix="check the path after --config"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            str(file), f"byte {error.start} is not UTF-8", expected="UTF-8 text", fix="convert the file to UTF-8"
        ) from None
    value, origins = parse_value(text, str(file), lambda line: f"{file}:{line}")
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ConfigError(
            str(file), f"holds {show(value)}", expected="a mapping of keys to values", fix="write `key: value` lines"
        )
    origins[()] = Origin(str(file), "")
    return Document(value, origins)


def _check_file(file: Path) -> None:
    """Raise ConfigError for what may have no end, or is too large for a configuration."""
    status = file.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        problem = "is a pipe or a device"
    elif status.st_size > LARGEST_FILE:
        problem = f"has {status.st_size:,} bytes"
    else:
        return  # also for a directory, which cannot be read
    raise ConfigError(
        str(file),
        problem,
        expected=f"a YAML file of at most {LARGEST_FILE:,} bytes",
        fix="check the path after --config",
    )


def parse_value(
    text: str, name: str, source: Callable[[int], str], *, above: Key = ()
) -> tuple[Any, dict[Key, Origin]]:
    """Parse a YAML text into plain values and the origins of its entries.

    Args:
        text: the YAML text.
        name: name of the text in messages about syntax.
        source: gives the origin's name for a line number (from 1).
        above: key of the value in its document.

    Returns:
        The value, and the origin of each entry by key. These keys do not include `above`.

    Raises:
        ConfigError: the text is not YAML, refers to itself, or holds tags of other types.
    """
    loader = None
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        origins: dict[Key, Origin] = {}
        value = None if node is None else _Reader(loader, source, origins, above).value(node, ())
    except TooMuch as error:
        raise ConfigError(
            name, str(error), expected=f"at most {MOST_VALUES:,} values", fix="remove aliases that stand for others"
        ) from None
    except yaml.YAMLError as error:
        raise _syntax_error(error, name) from None
    except RecursionError:
        raise ConfigError(
            name, "refers to itself or is nested too deeply", expected="a finite mapping", fix="remove the alias"
        ) from None
    finally:
        if loader is not None:
            loader.dispose()
    return value, origins


def dump_yaml(value: dict[str, Any]) -> str:
    """Write values as YAML that `read_document` reads back as the same values."""
    return str(yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False))


def show(value: object) -> str:
    """Show a value as in a configuration file, on one line of at most 80 characters."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    else:
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class _Reader:
    """A converter of composed YAML nodes into values. Aliased nodes become separate copies."""

    loader: Loader
    source: Callable[[int], str]
    origins: dict[Key, Origin]
    above: Key

    def _name(self, key: Key) -> str:
        return dotted((*self.above, *key))

    def value(self, node: yaml.Node, key: Key) -> Any:
        if len(self.origins) > MOST_VALUES:
            raise TooMuch(f"its aliases make more than {MOST_VALUES:,} values")
        if key:
            self.origins[key] = Origin(self.source(_line(node)), self._name(key))
        match node.tag.removeprefix(TAG), node:
            case "map", yaml.MappingNode():
                return self._mapping(node, key)
            case "seq", yaml.SequenceNode():
                return [self.value(item, (*key, index)) for index, item in enumerate(node.value)]
            case tag, yaml.ScalarNode():
                return self._scalar(node, tag, key)
        raise self._bad_tag(node, key)

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        self._refuse_duplicates(node, key)
        self.loader.flatten_mapping(node)
        values = {}
        for name_node, value_node in node.value:
            inner = (*key, str(name_node.value))
            values[str(name_node.value)] = self.value(value_node, inner)
            self.origins[inner] = Origin(self.source(_line(name_node)), self._name(inner))
        return values

    def _refuse_duplicates(self, node: yaml.MappingNode, key: Key) -> None:
        lines: dict[str, int] = {}
        for name_node, _ in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                raise ConfigError(
                    self.source(_line(name_node)), "a key is a list or mapping", expected="a name", fix="write a name"
                )
            name, line = str(name_node.value), _line(name_node)
            if name in lines:
                raise ConfigError(
                    f"{self.source(line)}: {self._name((*key, name))}",
                    f"the key stands twice, first on line {lines[name]}",
                    expected="every key once",
                    fix="remove one of them",
                )
            lines[name] = line

    def _scalar(self, node: yaml.ScalarNode, tag: str, key: Key) -> Any:
        text = str(node.value)
        try:
            match tag:
                case "str" | "merge":
                    return text
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[text.lower()]
                case "int":
                    return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))
                case "float":
                    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except (ValueError, KeyError):
            pass
        raise self._bad_tag(node, key)

    def _bad_tag(self, node: yaml.Node, key: Key) -> ConfigError:
        where = ": ".join(part for part in (self.source(_line(node)), self._name(key)) if part)
        seen = repr(node.value) if isinstance(node, yaml.ScalarNode) else "the value"
        return ConfigError(
            where, f"{seen} has the tag {node.tag}", expected="a plain value", fix="remove or correct the tag"
        )


def dotted(key: Key) -> str:
    """Write a key with dots: `("a", "b", 0)` becomes `a.b.0`."""
    return ".".join(map(str, key))


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _syntax_error(error: yaml.YAMLError, name: str) -> ConfigError:
    where, problem = name, str(error)
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark is not None else name
        problem = ", ".join(part for part in (error.context, error.problem) if part)
    return ConfigError(where, " ".join(problem.split()), expected="YAML", fix="correct the syntax")


@dataclass(frozen=True)
class Override:
    """One setting: its key, its value (parsed as YAML), and the origins of the value's entries."""

    key: Key
    value: Any
    origins: dict[Key, Origin]


def parse_override(text: str) -> Override:
    """Read `a.b.c=value`. The value may be any YAML value, one-line lists and mappings included.

    Raises ConfigError if the text has another form or the value is not YAML.
    """
    name, sign, value_text = text.partition("=")
    key: Key = tuple(part.strip() for part in name.split("."))
    if not sign or not all(key):
        raise ConfigError(
            COMMAND_LINE, f"got {text!r}", expected="key.path=value", fix="write for example optimizer.lr=1e-5"
        )
    value, inner = parse_value(value_text, f"{COMMAND_LINE}: {dotted(key)}", lambda line: COMMAND_LINE, above=key)
    return Override(key, value, {(): Origin(COMMAND_LINE, dotted(key)), **inner})


def apply_override(document: Document, override: Override) -> None:
    """Put the value into the document, in place. Sections on its path that are absent are made.

    Raises ConfigError if an entry on the path is not a section.
    """
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


def render_config(config: Section) -> str:
    """Write a configuration as YAML with every key, defaults included.

    Loading it gives an equal configuration.
    """
    return dump_yaml(config.model_dump(mode="json"))


def dump_config(config: Section, path: Path) -> None:
    """Write `render_config` to a file."""
    path.write_text(render_config(config), encoding="utf-8")


def config_digest(config: Section, upstream: Mapping[str, str] | None = None) -> str:
    """Return the SHA-256, in hexadecimal, of a resolved configuration.

    It is taken over the configuration's JSON with sorted keys and no white space. `upstream` holds
    the digests, by name, of the workflow stages whose output this configuration reads; the result
    depends on them, too.
    """
    value: object = json.loads(config.digest_json())
    if upstream:
        value = {"config": value, "upstream": dict(upstream)}
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
