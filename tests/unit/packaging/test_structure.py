"""What tools/structure counts stays within the limits that were set for a newcomer's sake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
LIMITS = {
    "files entered before the first loss of `align`": 71,
    "climbs of run_align:config": 5,
    "function-level imports in cli/": 10,
    'identifiers with the word "row"': 120,
    "public names defined twice": 0,
    "docstrings of functions that begin without a verb": 0,
    "docstrings of modules, classes and properties that are bare phrases": 0,
    "files in import circles": 0,
    "lines of the longest file": 400,
    "lines of the longest function": 70,
}


def test_the_structure_is_within_its_limits(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.structure", "--json", str(tmp_path / "counts.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert {name: counts[name] for name in LIMITS if counts[name] > LIMITS[name]} == {}
    # A count of nothing would be within any limit.
    assert counts["files entered before the first loss of `align`"] > 20
    assert counts["climbs of run_align:config"] > 0
