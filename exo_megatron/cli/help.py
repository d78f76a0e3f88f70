"""The texts of `--help`, generated from the configuration classes."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator

from exo_megatron.cli.doctor_options import DEFAULT_MINUTES, USAGE
from exo_megatron.config.describe import KeyDescription, describe_keys
from exo_megatron.config.sections import Section
from exo_megatron.config.stages import COMMAND_CONFIGS, STAGE_CONFIGS, RunConfig

OTHER_COMMANDS = {
    "run": "A YAML file of stages in order; stages that are complete are skipped.",
    "prepare": "Tokenise the data of a stage ahead of time, and say what their lengths mean for it.",
    "doctor": "What this machine has, which optional parts are active, and whether two processes can talk.",
}
PREPARED = ("sft", "align", "rollout", "evaluate")
"""Stages whose data `prepare` tokenises."""

COMMANDS = (*STAGE_CONFIGS, *COMMAND_CONFIGS, *OTHER_COMMANDS)


def summary(command: str) -> str:
    """Describe a command in one line."""
    if command in OTHER_COMMANDS:
        return OTHER_COMMANDS[command]
    section: type[Section] = {**STAGE_CONFIGS, **COMMAND_CONFIGS}[command]
    return (section.__doc__ or "").splitlines()[0]


def general_help() -> str:
    """Write the answer to `exo-megatron --help`."""
    commands = [f"  {name:<10}{summary(name)}" for name in COMMANDS]
    return "\n".join(
        [
            "usage: exo-megatron STAGE [--config FILE] [key=value ...]",
            "       exo-megatron run [--config FILE] [key=value ...]",
            f"       exo-megatron prepare {'|'.join(PREPARED)} [--config FILE] [key=value ...]",
            f"       exo-megatron {USAGE}",
            "",
            "Alignment of language models by efficient exact optimization (EXO) on megatron-core.",
            "",
            *commands,
            "",
            "  --help      this text; after a command's name, the keys of its configuration",
            "  --version   the version",
            "",
            "Several processes: torchrun, srun or mpirun ... python -m exo_megatron STAGE ...",
            "Exit codes: 0 done, 2 wrong input, 75 try again later, 1 any other failure.",
            "",
        ]
    )


def command_help(command: str) -> str:
    """Write the answer to `exo-megatron COMMAND --help`: all keys with type, default, meaning."""
    if command == "doctor":
        return _DOCTOR_HELP
    if command == "prepare":
        return _PREPARE_HELP
    if command == "run":
        return _settings_help(command, RunConfig, [*textwrap.wrap(_RUN_NOTES, _columns()), ""])
    return _settings_help(command, {**STAGE_CONFIGS, **COMMAND_CONFIGS}[command], [])


_DOCTOR_HELP = f"""usage: exo-megatron {USAGE}

{summary("doctor")}
Exit code 0 if the essentials work, else 1.

  --gpu          compute on the GPU instead, and compare with plain arithmetic on the CPU: attention, log-probs,
                 whole steps, checkpoints, decoding, experts; then speed and memory against what they should be.
                 Under torchrun with several ranks also at TP=n and DP=n. Exit code 0 if no check failed, else 1.
  --cpu          a small version of the same checks on the CPU, whose speed says nothing
  --json FILE    write the results there, with versions and device
  --minutes N    for all checks together (default {DEFAULT_MINUTES:g}); one that does not fit is named and not run
"""

_PREPARE_HELP = f"""usage: exo-megatron prepare {"|".join(PREPARED)} [--config FILE] [key=value ...]

{summary("prepare")}

Takes the configuration of the stage, whose start then maps what lies in the cache (data.cache). All processes
of torchrun, srun or mpirun work together; no model is loaded and no GPU used. Prints what was read and left
out, the lengths of prompts, candidates and groups, and how full micro-batches get, and writes data_report.json
and lengths.png to the output of the stage.
"""

_RUN_NOTES = (
    "Sections under `defaults` hold for every stage that has them, but `data` not for score; a stage's own values go "
    "before. "
    "In a stage's texts ${output} stands for the run's output and ${NAME} for the output of the stage NAME. "
    "A stage runs again when its configuration or a stage whose output it reads has changed; its earlier output "
    "is kept beside the new one as NAME.old-N. "
    "Settings: output=DIR, defaults.compute.precision=fp32, stages.NAME.optimizer.lr=1e-5."
)


def _settings_help(command: str, section: type[Section], notes: list[str]) -> str:
    head = [f"usage: exo-megatron {command} [--config FILE] [key=value ...]", "", summary(command), "", *notes]
    keys = [line for each in describe_keys(section) for line in _key_lines(each)]
    return "\n".join([*head, "Keys of FILE, which key=value replaces (values are YAML):", "", *keys, ""])


def _key_lines(key: KeyDescription) -> Iterator[str]:
    indent = 36
    first = f"{key.accepts}, {'required' if key.default is None else f'default {key.default}'}"
    text = [*textwrap.wrap(first, _columns() - indent), *textwrap.wrap(key.meaning, _columns() - indent)]
    yield f"  {key.key:<{indent - 3}} {text[0]}"
    yield from (" " * indent + line for line in text[1:])


def _columns() -> int:
    return max(72, min(shutil.get_terminal_size().columns, 120))
