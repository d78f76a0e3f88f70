"""A rank that freezes in training, in a rollout or in a save is named by the other one, which leaves.

Three of the 18 combinations of frozen_ranks.py, which runs all of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.multiprocess.harness import REPOSITORY, worker_environment

NAMES = ["dp-0-saving", "tp-1-rollout", "pp-0-training"]


def test_a_frozen_rank_is_named_in_time(tmp_path: Path) -> None:
    found = tmp_path / "outcomes.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.multiprocess.frozen_ranks", *NAMES, "--at-once", "3"]
    environment = worker_environment(0, 1, 0) | {"TORCH_CPP_LOG_LEVEL": "FATAL"}
    done = subprocess.run(
        [*command, "--json", str(found)], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert [each["name"] for each in json.loads(found.read_text()) if each["is_right"]] == NAMES
