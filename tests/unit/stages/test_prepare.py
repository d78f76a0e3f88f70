"""The command `prepare`: the same bytes for any number of processes and after a kill, and what it says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exo_megatron.cli.main import main
from exo_megatron.data import cache
from tests.reference.tiny_llama import save_hf, tiny_config, tiny_llama, word

ROOT = Path(__file__).parents[3]
RECORDS = 3 * cache.SHARD_RECORDS + 5


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("prepare")
    save_hf(tiny_llama(tiny_config(), seed=0), folder / "hf")
    assert main(["import", f"hf={folder / 'hf'}", f"output={folder / 'model'}"]) == 0
    with open(folder / "pairs.jsonl", "w") as file:
        for n in range(RECORDS):
            texts = {
                "prompt": word(3 + n % 7),
                "chosen": f" {word(4 + n % 5)}",
                "rejected": f" {word(9 + n % 3)} {word(3)}",
            }
            file.write(json.dumps(texts) + "\n")
    return [f"model.checkpoint={folder / 'model'}", f"data.path={folder / 'pairs.jsonl'}", "loss.kind=exo_pref"]


def words(folder: Path, settings: list[str]) -> list[str]:
    return ["align", *settings, f"output={folder / 'out'}", f"data.cache={folder / 'cache'}"]


def started(folder: Path, settings: list[str], *launcher: str) -> subprocess.Popen[str]:
    command = [*launcher, sys.executable, str(ROOT / "tools" / "prepare_data.py"), *words(folder, settings)]
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def files(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in (folder / "cache").rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.startswith(".")}


def test_the_same_bytes_whatever_the_processes_and_after_a_kill(tmp_path: Path, settings: list[str]) -> None:
    """Two processes go on from what a killed one has left."""
    killed = started(tmp_path / "two", settings)
    try:
        while not list((tmp_path / "two").rglob("shard-00000.arrow")):
            assert killed.poll() is None, killed.communicate()[0]
            time.sleep(0.005)
    finally:
        killed.kill()
        killed.communicate()
    left = files(tmp_path / "two")
    assert "index.json" not in left and len(left) < 4, "it was killed too late to show anything"
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert mpirun is not None
    process = started(tmp_path / "two", settings, mpirun, "--oversubscribe", "-n", "2")
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert main(["prepare", *words(tmp_path / "one", settings)]) == 0
    one = files(tmp_path / "one")
    assert sorted(one) == ["index.json", *(f"shard-{n:05d}.arrow" for n in range(4))]
    assert files(tmp_path / "two") == one
    assert said.count(f"{RECORDS:,} groups, {2 * RECORDS:,} candidates (K = 2)") == 1
    assert "compute.max_tokens_per_microbatch = 8,192" in said
    assert sorted(path.name for path in (tmp_path / "two" / "out").iterdir()) == ["data_report.json", "lengths.png"]


def test_a_command_without_a_stage_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "score"]) == 2
    assert "prepare got 'score'; expected prepare sft|align|rollout|evaluate" in capsys.readouterr().err
    assert main(["prepare", "--help"]) == 0
    assert "no GPU used" in capsys.readouterr().out
