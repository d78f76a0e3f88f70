"""The options of `exo-megatron doctor`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exo_megatron.errors import ConfigError

USAGE = "doctor [--gpu [--cpu] [--json FILE] [--minutes 4]]"
DEFAULT_MINUTES = 4.0
_VALUES = ("--json", "--minutes")
_FLAGS = ("--gpu", "--cpu", "--help", "-h")


@dataclass(frozen=True)
class DoctorOptions:
    """The options of one call.

    Attributes:
        gpu: compute on the device, and time it; else only look at what is installed.
        cpu: with `gpu`, a small version of it on the CPU.
        json: file for the results.
        minutes: of all checks together.
        help: tell how the command is used.
    """

    gpu: bool
    cpu: bool
    json: Path | None
    minutes: float
    help: bool


def parse_doctor_options(words: Sequence[str]) -> DoctorOptions:
    """Parse the words after `doctor`, in any order. Raises ConfigError."""
    flags: set[str] = set()
    values: dict[str, str] = {}
    rest = list(words)
    while rest:
        name, sign, value = rest.pop(0).partition("=")
        if name in _VALUES:
            value = value if sign else (rest.pop(0) if rest else "")
            if name in values or not value:
                raise _error(name, "given twice" if name in values else "has no value")
            values[name] = value
        elif name in _FLAGS and not sign:
            flags.add(name)
        else:
            what = "option" if name.startswith("-") else "setting"
            raise _error("command line", f"doctor has no {what} {name!r}")
    alone = [name for name in (*_VALUES, "--cpu") if name in flags | values.keys()]
    if alone and "--gpu" not in flags:
        raise _error(alone[0], "is an option of doctor --gpu")
    json = Path(values["--json"]) if "--json" in values else None
    minutes = _minutes(values["--minutes"]) if "--minutes" in values else DEFAULT_MINUTES
    return DoctorOptions("--gpu" in flags, "--cpu" in flags, json, minutes, not flags.isdisjoint({"--help", "-h"}))


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise ConfigError(
            "--minutes", f"{text!r} is no time", expected="a positive number of minutes", fix="give one, such as 4"
        )
    return minutes


def _error(where: str, problem: str) -> ConfigError:
    return ConfigError(where, problem, expected=f"exo-megatron {USAGE}", fix="see `exo-megatron doctor --help`")
