"""The entry of the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from exo_megatron import __version__
from exo_megatron.cli import help as texts
from exo_megatron.cli.arguments import Arguments, parse_arguments
from exo_megatron.cli.failure import leave_mpi, report
from exo_megatron.cli.run import run_pipeline
from exo_megatron.cli.stages import run_stage
from exo_megatron.config.describe import nearest
from exo_megatron.config.load import load_run_config, load_stage_config
from exo_megatron.config.stages import STAGE_CONFIGS
from exo_megatron.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give the exit code: 0 done, 2 wrong input, 75 try again later, 1 any other failure.

    argv: the words after the program's name; default: those of the process. With several processes a failure ends
    the process here (see `leaving_together`) instead of returning.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except (Exception, KeyboardInterrupt) as error:
        code = report(error)
        leave_mpi(code)
        return code


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(texts.general_help(), end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(f"exo-megatron {__version__}")
        return 0
    command, arguments = words[0], parse_arguments(words[1:])
    if command in STAGE_CONFIGS:
        return _stage(command, arguments)
    if command == "run":
        return _run(arguments)
    if command == "doctor":
        return _doctor(arguments)
    commands = [*STAGE_CONFIGS, *texts.OTHER_COMMANDS]
    near = nearest(command, commands)
    raise ConfigError(
        "command line",
        f"unknown command {command!r}",
        expected="one of " + ", ".join(commands),
        fix=f"write {near}" if near else "see --help",
    )


def _stage(stage: str, arguments: Arguments) -> int:
    if arguments.help:
        print(texts.stage_help(stage), end="")
    else:
        run_stage(stage, load_stage_config(stage, arguments.config, arguments.overrides))
    return 0


def _run(arguments: Arguments) -> int:
    if arguments.help:
        print(texts.run_help(), end="")
    else:
        run_pipeline(load_run_config(arguments.config, arguments.overrides))
    return 0


def _doctor(arguments: Arguments) -> int:
    if arguments.help:
        print(texts.doctor_help(), end="")
        return 0
    if arguments.config is not None or arguments.overrides:
        raise ConfigError("command line", "doctor takes no settings", expected="exo-megatron doctor", fix="remove them")
    from exo_megatron.cli.doctor import run_doctor

    return run_doctor()
