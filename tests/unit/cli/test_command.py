"""`python -m exo_megatron` in processes of its own: exit codes, single lines, and no heavy imports on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def command(*words: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "exo_megatron", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        timeout=120,
        check=False,
    )


@pytest.fixture
def no_torch(tmp_path):
    """An environment in which importing torch fails, so that a command that works does without."""
    (tmp_path / "blocked" / "torch").mkdir(parents=True)
    (tmp_path / "blocked" / "torch" / "__init__.py").write_text("raise RuntimeError('torch was imported')\n")
    return {"PYTHONPATH": f"{tmp_path / 'blocked'}{os.pathsep}{ROOT}"}


def test_help_needs_no_torch(tmp_path, no_torch):
    for words in (["--help"], ["--version"], ["align", "--help"], ["run", "--help"]):
        answer = command(*words, cwd=tmp_path, env=no_torch)
        assert (answer.returncode, answer.stderr) == (0, "")
        assert answer.stdout


def test_config_errors_need_no_torch_and_are_one_line(tmp_path, no_torch):
    (tmp_path / "c.yaml").write_text("output: o\nmodel: {checkpoint: m}\ndata: {path: d}\noptimiser: {lr: 1}\n")
    answer = command("align", "--config", "c.yaml", cwd=tmp_path, env=no_torch)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.startswith("exo-megatron: c.yaml:4: optimiser: unknown key 'optimiser'; expected one of ")
    assert answer.stderr.endswith("; fix: write optimizer\n")
    assert answer.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_other_ranks_keep_silent_about_the_config(tmp_path, no_torch):
    answer = command("align", "bad", cwd=tmp_path, env={**no_torch, "SLURM_PROCID": "3"})
    assert (answer.returncode, answer.stderr) == (2, "")


def test_a_broken_import_of_a_stage_is_a_failure_with_traceback(tmp_path, no_torch):
    answer = command("score", "output=o", "candidates=c", "reward.function=a:b", cwd=tmp_path, env=no_torch)
    assert answer.returncode == 1
    assert answer.stderr.endswith("RuntimeError: torch was imported\n")


def test_importing_the_main_module_runs_nothing(tmp_path):
    # megatron-core's checkpoint writer spawns processes that import the main module again.
    code = "import runpy; runpy.run_module('exo_megatron.__main__', run_name='__mp_main__'); print('quiet')"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert answer.stdout == "quiet\n"
