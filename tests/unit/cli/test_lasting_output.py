"""Nobody reads standard output any more, or its disk is full: the work goes on, with its own exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from exo_megatron.cli import main as cli
def work(words):
    for number in range(3000):
        print("a line of a stage, and", number, flush=number % 2 == 0)
        print("a line of its progress", file=sys.stderr)
    open(sys.argv[1], "w").write("done")
    sys.exit(0) if sys.argv[2] == "exit" else None
    return 75
cli._dispatch = work
sys.exit(cli.main(["align"]))
"""


@pytest.mark.parametrize("end", ["pipe", "full"])
@pytest.mark.parametrize(("way", "code"), [("return", 75), ("exit", 1)])
def test_a_closed_output_does_not_end_a_stage(end: str, way: str, code: int, tmp_path: Path) -> None:
    if end == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    try:
        program = [sys.executable, "-c", PROGRAM, str(tmp_path / "result"), way]
        ended = subprocess.run(program, stdout=writer, stderr=writer, timeout=60)
    finally:
        os.close(writer)
    assert (tmp_path / "result").read_text() == "done"
    assert ended.returncode == code, "a stage that a library ends with exit code 0 is not complete"
