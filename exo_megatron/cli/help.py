"""The texts of `--help`, made from the configuration classes."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator

from exo_megatron.config.describe import KeyDescription, describe_keys
from exo_megatron.config.sections import Section
from exo_megatron.config.stages import STAGE_CONFIGS, RunConfig

OTHER_COMMANDS = {
    "run": "A YAML file of stages in order; stages that are complete are skipped.",
    "doctor": "What this machine has, which optional parts are active, and whether two processes can talk.",
}


def summary(command: str) -> str:
    """One line about a command."""
    return OTHER_COMMANDS[command] if command in OTHER_COMMANDS else _first_line(STAGE_CONFIGS[command])


def general_help() -> str:
    """The answer to `exo-megatron --help`."""
    commands = [f"  {name:<10}{summary(name)}" for name in (*STAGE_CONFIGS, *OTHER_COMMANDS)]
    return "\n".join(
        [
            "usage: exo-megatron STAGE --config FILE [key=value ...]",
            "       exo-megatron run --config FILE [key=value ...]",
            "       exo-megatron doctor",
            "",
            "Alignment of language models by efficient exact optimization (EXO) on megatron-core.",
            "",
            *commands,
            "",
            "  --help      this text; after a stage's name, the keys of its configuration",
            "  --version   the version",
            "",
            "Several processes: torchrun, srun or mpirun ... python -m exo_megatron STAGE ...",
            "Exit codes: 0 done, 2 wrong input, 75 try again later, 1 any other failure.",
            "",
        ]
    )


def stage_help(stage: str) -> str:
    """The answer to `exo-megatron STAGE --help`: every key with its type, default and meaning."""
    return _command_help(stage, STAGE_CONFIGS[stage], [])


def run_help() -> str:
    """The answer to `exo-megatron run --help`."""
    notes = (
        "Sections under `defaults` hold for every stage that has them; a stage's own values go before. "
        "In a stage's texts ${output} stands for the run's output and ${NAME} for the output of the stage NAME. "
        "A stage runs again when its configuration or a stage whose output it reads has changed; its earlier output "
        "is kept beside the new one as NAME.old-N. "
        "Settings: output=DIR, defaults.compute.precision=fp32, stages.NAME.optimizer.lr=1e-5."
    )
    return _command_help("run", RunConfig, [*textwrap.wrap(notes, _columns()), ""])


def doctor_help() -> str:
    """The answer to `exo-megatron doctor --help`."""
    return f"usage: exo-megatron doctor\n\n{OTHER_COMMANDS['doctor']}\nExit code 0 if the essentials work, else 1.\n"


def _command_help(command: str, section: type[Section], notes: list[str]) -> str:
    head = [f"usage: exo-megatron {command} --config FILE [key=value ...]", "", summary(command), "", *notes]
    keys = [line for each in describe_keys(section) for line in _key_lines(each)]
    return "\n".join([*head, "Keys of FILE, which key=value replaces (values are YAML):", "", *keys, ""])


def _key_lines(key: KeyDescription) -> Iterator[str]:
    indent = 36
    first = f"{key.accepts}, {'required' if key.default is None else f'default {key.default}'}"
    text = [*textwrap.wrap(first, _columns() - indent), *textwrap.wrap(key.meaning, _columns() - indent)]
    yield f"  {key.key:<{indent - 3}} {text[0]}"
    yield from (" " * indent + line for line in text[1:])


def _first_line(section: type[Section]) -> str:
    return (section.__doc__ or "").splitlines()[0]


def _columns() -> int:
    return max(72, min(shutil.get_terminal_size().columns, 120))
