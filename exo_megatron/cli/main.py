"""The command line: parsing of its arguments, and the command that it starts."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from exo_megatron import __version__
from exo_megatron.cli import help as texts
from exo_megatron.cli.doctor_options import DoctorOptions, parse_doctor_options
from exo_megatron.config.describe import nearest
from exo_megatron.config.load import load_command_config, load_run_config, load_stage_config
from exo_megatron.config.sections import Section
from exo_megatron.config.stages import STAGE_CONFIGS, PicklesConfig, VerifyConfig
from exo_megatron.errors import ConfigError
from exo_megatron.parallel.leaving import leave_mpi, report


@dataclass(frozen=True)
class Arguments:
    """Arguments of a command: `--config FILE`, `key=value` settings in order, `--help`."""

    config: Path | None
    overrides: tuple[str, ...]
    help: bool


def parse_arguments(words: Sequence[str]) -> Arguments:
    """Parse the words in any order.

    Raises ConfigError for an unknown option or a repeated or empty --config.
    """
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
                "command line", f"unknown option {word!r}", expected="[--config FILE] [key=value ...]", fix="see --help"
            )
        else:
            overrides.append(word)
    return Arguments(None if config is None else Path(config), tuple(overrides), help_wanted)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 2 wrong input, 75 try again later, 1 any
    other failure.

    argv: the words after the program's name; default: those of the process. With several processes
    a failure ends the process here (see `leaving_together`) instead of returning.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # What other commands print is their result, whose loss must not pass for success.
    with lasting_output() if words[:1] and words[0] in (*STAGE_CONFIGS, "run") else nullcontext():
        try:
            return _dispatch(words)
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            code = report(error)
            leave_mpi(code)
            return code


class _PatientFile(io.FileIO):
    """A file that drops what it cannot write: nobody reads the pipe any more, or the disk of the log is full."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let no failed write to standard output or error end a block, those of libraries and of user's code included.

    Streams that stand for no file, such as those of a test, stay as they are.
    """
    former = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_patient, former)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = former


def _patient(stream: TextIO) -> TextIO:
    with suppress(OSError):
        stream.flush()
    try:
        number = stream.fileno()
    except (OSError, ValueError, AttributeError):
        return stream
    file = io.BufferedWriter(_PatientFile(number, "wb", closefd=False))
    return io.TextIOWrapper(file, encoding=stream.encoding, errors=stream.errors, line_buffering=True)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(texts.general_help(), end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(f"exo-megatron {__version__}")
        return 0
    if words[0] == "doctor":
        return _doctor(parse_doctor_options(words[1:]))
    if words[0] == "prepare":
        return _prepare(words[1:])
    command, arguments = words[0], parse_arguments(words[1:])
    if command not in texts.COMMANDS:
        near = nearest(command, texts.COMMANDS)
        raise ConfigError(
            "command line",
            f"unknown command {command!r}",
            expected="one of " + ", ".join(texts.COMMANDS),
            fix=f"write {near}" if near else "see --help",
        )
    if arguments.help:
        print(texts.command_help(command), end="")
        return 0
    return _run(command, arguments)


def _run(command: str, arguments: Arguments) -> int:
    """Read the settings, and only then import the modules that do the work: torch and more."""
    file, overrides = arguments.config, arguments.overrides
    if command in STAGE_CONFIGS:
        config = load_stage_config(command, file, overrides)
        from exo_megatron.stages.run import run_stage

        run_stage(command, config)
        return 0
    if command == "run":
        workflow = load_run_config(file, overrides)
        from exo_megatron.stages.run import run_workflow

        run_workflow(workflow)
        return 0
    return run_command(load_command_config(command, file, overrides))


def _prepare(words: Sequence[str]) -> int:
    stage, arguments = words[0] if words else "", parse_arguments(words[1:])
    if stage in ("-h", "--help"):
        print(texts.command_help("prepare"), end="")
        return 0
    if stage not in texts.PREPARED:
        raise ConfigError(
            "command line",
            f"prepare got {stage!r}" if stage else "prepare names no stage",
            expected=f"prepare {'|'.join(texts.PREPARED)} [--config FILE] [key=value ...]",
            fix="name the stage whose data are to be tokenised",
        )
    if arguments.help:
        print(texts.command_help(stage), end="")
        return 0
    config = load_stage_config(stage, arguments.config, arguments.overrides)
    from exo_megatron.stages.run import run_prepare

    return run_prepare(config)


def _doctor(options: DoctorOptions) -> int:
    if options.help:
        print(texts.command_help("doctor"), end="")
        return 0
    from exo_megatron.cli.doctor import run_doctor, run_gpu_doctor

    return run_gpu_doctor(options) if options.gpu else run_doctor()


def run_command(config: Section) -> int:
    """Run `verify` or `pickles` and return the exit code."""
    if isinstance(config, VerifyConfig):
        from exo_megatron.stages.run import run_verify

        return run_verify(config)
    if isinstance(config, PicklesConfig):
        from exo_megatron.stages.pickles import run_pickles

        return run_pickles(config)
    raise TypeError(f"no command has a {type(config).__name__}")


def run_program(work: Callable[[], int]) -> int:
    """Run a program of `tools/` and return the exit code; errors are reported as in `main`."""
    try:
        return work()
    except (Exception, KeyboardInterrupt) as error:
        return report(error)
