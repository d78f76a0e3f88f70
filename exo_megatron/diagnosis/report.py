"""Lines of text about the checks while they run, and the JSON file with their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from exo_megatron.diagnosis.checks import Result
from exo_megatron.errors import ConfigError
from exo_megatron.utils.files import write_json
from exo_megatron.utils.tables import render_table, stdout_width

VERDICT_WIDTH, NAME_WIDTH = 20, 48
Environment = Mapping[str, str | int | float | None]


def introduce(environment: Environment) -> str:
    """Describe the environment in lines of text."""
    lines = [(name, str(value)) for name, value in environment.items() if value is not None]
    return render_table((), lines, width=stdout_width(), indent=2)


def show_result(result: Result) -> str:
    """Describe a result in lines of text; blanks give the columns one width in all of them."""
    seen = f"{result.seen}; expected {result.expected}" if result.seen else result.expected
    cells = (f"{result.verdict:<{VERDICT_WIDTH}}", f"{result.check:<{NAME_WIDTH}}", seen)
    return render_table((), [cells], width=stdout_width(), indent=2)


def conclude(results: Sequence[Result]) -> str:
    """Count the verdicts in one line."""
    verdicts = [result.verdict for result in results]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)) + "."


def write_results(path: Path, environment: Environment, results: Sequence[Result]) -> None:
    """Write the environment and the results so far.

    Raises ConfigError if the file cannot be written.
    """
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"environment": environment, "results": [asdict(result) for result in results]})
    except OSError as error:
        raise ConfigError(
            "--json",
            f"{path} cannot be written ({error.strerror or error})",
            expected="a file in a directory that can be written",
            fix="choose another file",
        ) from None
