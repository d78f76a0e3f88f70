"""What stands on the command line after the command's name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exo_megatron.errors import ConfigError


@dataclass(frozen=True)
class Arguments:
    """`--config FILE`, the `key=value` settings in order, and whether `--help` was asked for."""

    config: Path | None
    overrides: tuple[str, ...]
    help: bool


def parse_arguments(words: Sequence[str]) -> Arguments:
    """Read the words in any order. Raises ConfigError for an unknown option or a repeated or empty --config."""
    config: str | None = None
    overrides: list[str] = []
    help_wanted = False
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, sign, value = word.partition("=")
        if word in ("-h", "--help"):
            help_wanted = True
        elif name == "--config":
            value = value if sign else (rest.pop(0) if rest else "")
            if config is not None or not value:
                problem = "given twice" if config is not None else "names no file"
                raise ConfigError("--config", problem, expected="--config FILE, once", fix="name one file")
            config = value
        elif word.startswith("-"):
            raise ConfigError(
                "command line", f"unknown option {word!r}", expected="--config FILE [key=value ...]", fix="see --help"
            )
        else:
            overrides.append(word)
    return Arguments(None if config is None else Path(config), tuple(overrides), help_wanted)
