"""slurm/exo_6b.sh with a tiny model through environment overrides: two nodes, tensor and data parallel."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from exo_megatron.checkpoint.directory import list_steps
from exo_megatron.checkpoint.safety import verify_checkpoint
from tests.reference.tiny_llama import FIRST_WORD_ID, VOCAB_SIZE, save_hf, text, tiny_config, tiny_llama
from tests.slurm.cluster import Cluster
from tests.slurm.test_job_script import ENDED, SCRIPT, SMALL, log, wait_until

pytestmark = pytest.mark.slurm

GROUPS, GROUPS_PER_STEP = 24, 4
TINY_MODEL = (
    f"compute.precision=fp32 compute.max_tokens_per_microbatch=256 batch.groups={GROUPS_PER_STEP} "
    "optimizer.warmup_steps=0 optimizer.lr=1e-3 save.interval=2 candidates=3"
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """MODEL and DATA: a converted random model, and prompts with three rewarded completions each."""
    folder = tmp_path_factory.mktemp("inputs")
    hf = save_hf(tiny_llama(tiny_config(), seed=0), folder / "hf")
    tool = SCRIPT.parents[1] / "tools" / "convert_hf_to_megatron.py"
    command = [sys.executable, str(tool), "--hf", str(hf), "--output", str(folder / "checkpoint")]
    subprocess.run(command, check=True, timeout=120)
    draw = random.Random(0)

    def words(least: int, most: int) -> str:
        return text([draw.randrange(FIRST_WORD_ID, VOCAB_SIZE) for _ in range(draw.randint(least, most))])

    records = [
        {
            "prompt": words(3, 9),
            "completions": [words(2, 8) for _ in range(3)],
            "rewards": [draw.gauss(0, 1) for _ in range(3)],
        }
        for _ in range(GROUPS)
    ]
    data = folder / "groups.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {
        "MODEL": str(folder / "checkpoint"),
        "DATA": str(data),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "MAX_CRASHES": "0",
    }


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def submit(cluster: Cluster, folder: Path, settings: dict[str, str], output: Path, extra: str = "") -> int:
    env = {**settings, "OUTPUT": str(output), "TP": "2", "PP": "1", "EXTRA": f"{TINY_MODEL} {extra}"}
    return cluster.submit(*SMALL, str(SCRIPT), extra_env=env, cwd=folder)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a job that nobody stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job_id = submit(cluster, folder, settings, folder / "out")
    fields = cluster.wait(job_id, ENDED, timeout=240)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "0"), log(folder, job_id)
    return folder / "out"


def test_job_leaves_a_complete_checkpoint(undisturbed: Path) -> None:
    steps = list_steps(undisturbed)
    assert steps[-1][0] == GROUPS // GROUPS_PER_STEP
    verify_checkpoint(steps[-1][1])
    assert json.loads((undisturbed / "stage.json").read_text())["status"] == "complete"
    assert [record["step"] for record in metrics(undisturbed)] == [1, 2, 3, 4, 5, 6]


def test_stopped_job_goes_on_and_ends_with_the_same_losses(
    cluster: Cluster, settings: dict[str, str], undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    job_id = submit(cluster, tmp_path, settings, output)
    wait_until((output / "metrics.jsonl").exists, timeout=240)
    cluster.command("scancel", "--signal=USR2", "--batch", str(job_id))
    cluster.wait(job_id, {"PENDING", *ENDED}, timeout=120)
    saved = list_steps(output)
    assert saved, log(tmp_path, job_id)
    assert saved[-1][0] < GROUPS // GROUPS_PER_STEP, "the job ended before the signal reached it"
    cluster.restart(job_id)
    fields = cluster.wait(job_id, ENDED, timeout=240)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log(tmp_path, job_id)
    assert [record["loss"] for record in metrics(output)] == [record["loss"] for record in metrics(undisturbed)]
