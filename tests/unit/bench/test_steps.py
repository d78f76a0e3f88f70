"""Small versions of the benchmarks of training steps: both sides run, and a wrong gradient is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench.lengths import HH, TLDR, Lengths
from tools.bench.models import Shape
from tools.bench.sharing import formula

PEERS = ["trl-step", "hf-step"]
REPOSITORY = Path(__file__).resolve().parents[3]
WRONG_GRADIENT = """
import sys
from tools.bench import training
from tools.bench.__main__ import main
right = training.hf_gradients
def wrong(trainee, matched):
    gradients = right(trainee, matched)
    name = sorted(gradients)[len(gradients) // 2]
    return {**gradients, name: gradients[name] * 1.001}
training.hf_gradients = wrong
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments: str, program: tuple[str, ...] = ("-m", "tools.bench")) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because a benchmark joins a world and prepares megatron-core for the CPU."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *program, *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_small_versions_run(tmp_path: Path) -> None:
    names = [*PEERS, "sharing", "peak"]
    done = run(*names, "--quick", "--json", str(tmp_path / "tables.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    tables = json.loads((tmp_path / "tables.json").read_text())
    assert list(tables) == names
    assert [len(table["rows"]) for table in tables.values()] == [6, 6, 2, 2]
    differences = [row["gradient difference"] for name in [*PEERS, "sharing"] for row in tables[name]["rows"]]
    assert all(0 < float(difference) < 1e-4 for difference in differences)  # 0: a side compared with itself


def test_wrong_gradient_is_found_before_any_time_is_printed() -> None:
    done = run(*PEERS, "--quick", program=("-c", WRONG_GRADIENT))
    assert done.returncode == 1
    for name in PEERS:
        assert f"{name}: the sides do not compute the same: relative difference 1.0e-03" in done.stderr
    assert "|" not in done.stdout


def test_unknown_name_is_told() -> None:
    done = run("trl-setp")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'trl-setp'" in done.stderr


def test_formula_of_sharing_by_hand() -> None:
    # One layer, H = 4, ffn 64: 4 * 16 + 3 * 4 * 64 = 832 weights, 1664 FLOPs a token, 16 FLOPs a pair.
    shape = Shape(hidden=4, layers=1, vocab=10, head_dim=4)
    assert shape.linear_parameters == 832
    # P = 3, R = 2, K = 2. Separate: 2 sequences of 5. Shared: 3 + 4 tokens; pairs 4.5 + 2 * (6 + 2).
    assert formula(shape, 3, 2, 2) == pytest.approx((1664 * 10 + 16 * 25) / (1664 * 7 + 16 * 20.5))


def test_formula_of_sharing_is_that_of_the_facts_for_a_7b_model() -> None:
    shape = Shape(hidden=4096, layers=32, vocab=32_000)
    ideal = {(47, 230, 4): 1.14, (400, 50, 4): 2.98, (400, 50, 8): 4.45, (512, 512, 4): 1.58, (1024, 128, 8): 4.43}
    for (prompt, length, candidates), speedup in ideal.items():
        assert formula(shape, prompt, length, candidates) == pytest.approx(speedup, rel=0.012)


def test_length_lists_are_what_the_documentation_says() -> None:
    for lengths, prompt, candidate in ((HH, 47, 230), (TLDR, 400, 50)):
        drawn = lengths.draw(4000, 2)
        assert drawn[:5] == lengths.draw(4000, 2)[:5]
        assert sum(each.prompt for each in drawn) / 4000 == pytest.approx(prompt, rel=0.06)
        assert sum(sum(each.candidates) for each in drawn) / 8000 == pytest.approx(candidate, rel=0.06)
        assert max(each.prompt for each in drawn) <= 512
        assert isinstance(drawn[0], Lengths)
