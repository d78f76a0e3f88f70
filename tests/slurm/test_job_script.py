"""What slurm/exo_6b.sh makes of the ways a stage can end, with a small script in the place of Python."""

from __future__ import annotations

import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm

SCRIPT = Path(__file__).parents[2] / "slurm" / "exo_6b.sh"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
SMALL = ("--nodes=2", "--ntasks-per-node=2", "--gres=none")


def submit(cluster: Cluster, folder: Path, program: str, *options: str, **settings: str) -> int:
    """A job of 2 x 2 tasks; `program` is the bash body that every task runs with the stage's arguments."""
    executable = folder / "program.sh"
    executable.write_text(f"#!/usr/bin/env bash\n{program}\n")
    executable.chmod(executable.stat().st_mode | stat.S_IXUSR)
    env = {"PYTHON": str(executable), "OUTPUT": str(folder / "out"), "RETRY_DELAY": "0", **settings}
    return cluster.submit(*SMALL, *options, str(SCRIPT), extra_env=env, cwd=folder)


def log(folder: Path, job_id: int) -> str:
    return (folder / f"exo-6b-{job_id}.out").read_text()


def test_script_as_it_is_fits_two_nodes_of_eight_gpus(cluster: Cluster, tmp_path: Path) -> None:
    answer = cluster.command("sbatch", "--test-only", str(SCRIPT), cwd=tmp_path)
    assert "using 128 processors on nodes node[1-2]" in answer


def test_tasks_get_their_settings_and_one_address(cluster: Cluster, tmp_path: Path) -> None:
    program = f'echo "$SLURM_PROCID $SLURM_LOCALID $MASTER_ADDR:$MASTER_PORT $*" > {tmp_path}/task-$SLURM_PROCID'
    job_id = submit(
        cluster,
        tmp_path,
        program,
        MODEL="ckpt",
        DATA="d.jsonl",
        TP="2",
        PP="1",
        EP="2",
        EXTRA="loss.kind=dpo_rw seed=7",
    )
    assert cluster.wait(job_id, ENDED, timeout=60)["JobState"] == "COMPLETED", log(tmp_path, job_id)
    tasks = [(tmp_path / f"task-{rank}").read_text().split(maxsplit=3) for rank in range(4)]
    assert [task[0] for task in tasks] == ["0", "1", "2", "3"]
    assert [task[1] for task in tasks] == ["0", "1", "0", "1"]
    assert len({task[2] for task in tasks}) == 1
    assert tasks[0][2].startswith("127.0.0.1:")
    config = SCRIPT.parents[1] / "examples" / "configs" / "align_6b.yaml"
    assert tasks[0][3].strip() == (
        f"-m exo_megatron align --config {config} output={tmp_path}/out model.checkpoint=ckpt data.path=d.jsonl "
        "parallel.tensor=2 parallel.pipeline=1 parallel.expert=2 loss.kind=dpo_rw seed=7"
    )
    assert not (tmp_path / ".exo-slurm").exists()


def test_a_file_of_stages(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").touch()
    job_id = submit(cluster, tmp_path, f'echo "$*" > {tmp_path}/task', STAGE="run", CONFIG="run.yaml", TP="2")
    assert cluster.wait(job_id, ENDED, timeout=60)["JobState"] == "COMPLETED", log(tmp_path, job_id)
    wanted = f"-m exo_megatron run --config {tmp_path}/run.yaml output={tmp_path}/out defaults.parallel.tensor=2\n"
    assert (tmp_path / "task").read_text() == wanted


def test_wrong_input_is_not_retried(cluster: Cluster, tmp_path: Path) -> None:
    # One task fails first: srun itself then reports 143.
    program = f"echo x >> {tmp_path}/starts-$SLURM_PROCID; [ $SLURM_PROCID = 1 ] && exit 2; sleep 60"
    job_id = submit(cluster, tmp_path, program)
    fields = cluster.wait(job_id, ENDED, timeout=60)
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "2:0"), log(tmp_path, job_id)
    assert (tmp_path / "starts-0").read_text() == "x\n"


def test_crash_is_retried_in_place_on_another_port(cluster: Cluster, tmp_path: Path) -> None:
    program = (
        f"echo $MASTER_PORT >> {tmp_path}/ports-$SLURM_PROCID\n"
        f"[ $(wc -l < {tmp_path}/ports-$SLURM_PROCID) = 1 ] || exit 0\n"
        "[ $SLURM_PROCID = 3 ] && kill -9 $$\nsleep 60"
    )
    job_id = submit(cluster, tmp_path, program)
    fields = cluster.wait(job_id, ENDED, timeout=60)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "0"), log(tmp_path, job_id)
    ports = (tmp_path / "ports-0").read_text().split()
    assert len(set(ports)) == 2
    assert "crashed" in log(tmp_path, job_id)


def test_crashes_have_an_end(cluster: Cluster, tmp_path: Path) -> None:
    job_id = submit(cluster, tmp_path, f"echo x >> {tmp_path}/starts-$SLURM_PROCID; exit 1", MAX_CRASHES="1")
    fields = cluster.wait(job_id, ENDED, timeout=60)
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "1:0"), log(tmp_path, job_id)
    assert "gave up after 2 attempts" in log(tmp_path, job_id)


SAVES_ON_SIGNAL = """
trap 'sleep 0.$SLURM_PROCID; touch {folder}/saved-$SLURM_PROCID; exit 75' USR2
[ -e {folder}/saved-$SLURM_PROCID ] && exit 0
touch {folder}/running-$SLURM_PROCID
for _ in {{1..600}}; do sleep 0.1; done
"""


def wait_until(condition: Callable[[], bool], *, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.1)


@pytest.mark.parametrize("signal_name", ["USR2", "TERM"])
def test_stopped_job_saves_requeues_and_completes(cluster: Cluster, tmp_path: Path, signal_name: str) -> None:
    job_id = submit(cluster, tmp_path, SAVES_ON_SIGNAL.format(folder=tmp_path))
    wait_until(lambda: len(list(tmp_path.glob("running-*"))) == 4, timeout=30)
    cluster.command("scancel", f"--signal={signal_name}", "--batch", str(job_id))
    cluster.wait(job_id, {"PENDING"}, timeout=30)
    # Although task 0 was ready first, the others could finish.
    assert all((tmp_path / f"saved-{rank}").exists() for rank in range(4))
    cluster.restart(job_id)
    fields = cluster.wait(job_id, ENDED, timeout=60)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log(tmp_path, job_id)
    assert "asked to stop" in log(tmp_path, job_id)
    assert "restart 1, attempt 0" in log(tmp_path, job_id)


def test_cancelled_job_does_not_come_back(cluster: Cluster, tmp_path: Path) -> None:
    job_id = submit(cluster, tmp_path, SAVES_ON_SIGNAL.format(folder=tmp_path))
    wait_until(lambda: len(list(tmp_path.glob("running-*"))) == 4, timeout=30)
    cluster.command("scancel", str(job_id))
    cluster.wait(job_id, ENDED, timeout=60)
    time.sleep(2)  # a requeued job would be pending by now
    fields = cluster.wait(job_id, ENDED, timeout=10)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0"), log(tmp_path, job_id)


def test_restart_budget(cluster: Cluster, tmp_path: Path) -> None:
    job_id = submit(cluster, tmp_path, "exit 75", MAX_RESTARTS="0")
    fields = cluster.wait(job_id, ENDED, timeout=60)
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "75:0"), log(tmp_path, job_id)


def test_completed_stage_is_done_although_a_task_failed_at_its_end(cluster: Cluster, tmp_path: Path) -> None:
    program = (
        f"mkdir -p {tmp_path}/out\n"
        f'[ $SLURM_PROCID = 0 ] && echo \'{{"stage": "align", "status": "complete"}}\' > {tmp_path}/out/stage.json\n'
        "sleep 0.5; exit $SLURM_PROCID"
    )
    job_id = submit(cluster, tmp_path, program)
    assert cluster.wait(job_id, ENDED, timeout=60)["JobState"] == "COMPLETED", log(tmp_path, job_id)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"STAGE": "aling"}, "STAGE=aling: expected sft, rollout"),
        ({"STAGE": "score", "MODEL": "m"}, "MODEL has no meaning for STAGE=score"),
        ({"STAGE": "sft"}, "STAGE=sft needs CONFIG"),
        ({"CONFIG": "missing.yaml"}, "CONFIG=missing.yaml does not exist"),
        ({"VENV": "/nowhere"}, "there is no /nowhere/bin/python"),
    ],
)
def test_wrong_settings_end_the_job_before_any_task(
    cluster: Cluster, tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    job_id = submit(cluster, tmp_path, "exit 0", **settings)
    fields = cluster.wait(job_id, ENDED, timeout=60)
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "2:0")
    assert message in log(tmp_path, job_id)


def test_container_options_reach_srun(cluster: Cluster, tmp_path: Path) -> None:
    arguments = arguments_of_srun(cluster, tmp_path, CONTAINER_MOUNTS="/data:/data", SRUN_ARGS="--mpi=none --exact")
    root = SCRIPT.parents[1]
    assert f"--container-image={IMAGE}" in arguments
    mounts = f"--container-mounts={root}:{root},{tmp_path}:{tmp_path},{tmp_path}:{tmp_path},/data:/data"
    assert mounts in arguments
    assert f"--container-workdir={tmp_path}" in arguments
    place = arguments.index("--mpi=none")
    assert arguments[place : place + 3] == ["--mpi=none", "--exact", "bash"]


def test_tasks_write_where_it_is_mounted_wherever_they_start(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    (tmp_path / "align.yaml").touch()
    settings = {"CONTAINER_WORKDIR": "/elsewhere", "OUTPUT": "link/out", "CONFIG": "align.yaml"}
    arguments = arguments_of_srun(cluster, tmp_path, **settings)
    root, link = SCRIPT.parents[1], tmp_path / "link"
    assert "--container-workdir=/elsewhere" in arguments
    assert f"--container-mounts={root}:{root},{tmp_path}:{tmp_path},{link}:{link}" in arguments
    assert f"output={link}/out" in arguments
    assert f"{tmp_path}/align.yaml" in arguments


IMAGE = "nvcr.io#nvidia/pytorch:25.09-py3"


def arguments_of_srun(cluster: Cluster, folder: Path, **settings: str) -> list[str]:
    """What the job gives to srun. pyxis is not here; a stand-in for srun keeps its arguments."""
    (folder / "srun").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {folder}/arguments\n')
    (folder / "srun").chmod(0o755)
    path = f"{folder}:{cluster.env['PATH']}"
    job_id = submit(cluster, folder, "exit 0", PATH=path, CONTAINER_IMAGE=IMAGE, **settings)
    assert cluster.wait(job_id, ENDED, timeout=60)["JobState"] == "COMPLETED", log(folder, job_id)
    return (folder / "arguments").read_text().splitlines()
