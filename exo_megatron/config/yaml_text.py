"""The scanner and composer of PyYAML with the scalars of YAML 1.2, and bounds for what aliases multiply."""

from __future__ import annotations

import re

import yaml

MOST_VALUES = 10_000
"""Values that a document may have once aliases stand for what they name."""

MOST_MERGED = 100
"""Mappings that one mapping may merge (`<<`)."""

TAG = "tag:yaml.org,2002:"
_NUMBER = re.compile(
    r"[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))\Z|\.(?:nan|NaN|NAN)\Z"
)
_RESOLVERS = (
    ("null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    ("int", re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), list("-+0123456789")),
    ("float", _NUMBER, list("-+.0123456789")),
    ("merge", re.compile(r"<<\Z"), ["<"]),
)


class TooMuch(yaml.YAMLError):
    """A document of a few bytes that stands for more values than a configuration has."""


class Loader(yaml.SafeLoader):
    """The scanner and composer of PyYAML with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._merged = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge what `<<` names. Raises TooMuch before merging over and over takes long or much memory."""
        sources = [value for name, value in node.value if name.tag == TAG + "merge"]
        if any(isinstance(each, yaml.SequenceNode) and len(each.value) > MOST_MERGED for each in sources):
            raise TooMuch(f"a mapping merges more than {MOST_MERGED} others")
        super().flatten_mapping(node)
        self._merged += len(node.value) if sources else 0
        if self._merged > MOST_VALUES:
            raise TooMuch(f"merging makes more than {MOST_VALUES:,} entries")


class Dumper(yaml.SafeDumper):
    """A dumper that quotes every text that YAML 1.1 or 1.2 would read as something else."""


for _name, _pattern, _first in _RESOLVERS:
    Loader.add_implicit_resolver(TAG + _name, _pattern, _first)
    Dumper.add_implicit_resolver(TAG + _name, _pattern, _first)
