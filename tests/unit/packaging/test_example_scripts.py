"""The scripts of the examples explain themselves before anything is installed or written."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"
HELP = {"quickstart": "--data    real labelled texts", "frontier": "--stages  also the same question"}
CASES = [
    (["--dat", "x"], 2, "unknown argument --dat"),
    (["--output"], 2, "--output needs a value"),
    (["--data", "/no/such/file"], 2, "--data /no/such/file: no such file"),
]


@pytest.mark.parametrize(
    ("example", "arguments", "code", "words"),
    [(name, *case) for name, words in HELP.items() for case in [(["--help"], 0, words), *CASES]],
)
def test_script_explains_itself(tmp_path: Path, example: str, arguments: list[str], code: int, words: str) -> None:
    command = ["bash", str(EXAMPLES / example / "run.sh"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert words in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
