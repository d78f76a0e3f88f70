"""Variables of a launcher that are missing, no numbers or out of range are refused by name."""

from __future__ import annotations

import pytest

from exo_megatron.errors import TopologyError
from exo_megatron.parallel.launch import Launch, detect_launch

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_JOB_ID": "7",
}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2"}
WRONG = [
    (TORCHRUN, "WORLD_SIZE", "two"),
    (TORCHRUN, "WORLD_SIZE", "0"),
    (TORCHRUN, "RANK", "2"),
    (TORCHRUN, "RANK", "-1"),
    (TORCHRUN, "RANK", "1.0"),
    (TORCHRUN, "RANK", "²"),
    (TORCHRUN, "RANK", "9" * 5000),
    (TORCHRUN, "LOCAL_RANK", ""),
    (TORCHRUN, "LOCAL_RANK", "2"),
    (TORCHRUN, "MASTER_ADDR", " "),
    (TORCHRUN, "MASTER_PORT", "abc"),
    (TORCHRUN, "MASTER_PORT", "0"),
    (TORCHRUN, "MASTER_PORT", "65536"),
    (SLURM, "SLURM_PROCID", "x"),
    (SLURM, "SLURM_PROCID", "2"),
    (SLURM, "SLURM_LOCALID", "x"),
    (SLURM, "SLURM_STEP_NUM_TASKS", "x"),
    (SLURM, "SLURM_STEP_NUM_NODES", "x"),
    (SLURM, "SLURM_JOB_ID", "x"),
    (SLURM, "MASTER_PORT", "70000"),
    (OPEN_MPI, "OMPI_COMM_WORLD_RANK", "x"),
    (OPEN_MPI, "OMPI_COMM_WORLD_RANK", "2"),
    (OPEN_MPI, "OMPI_COMM_WORLD_SIZE", "x"),
    (OPEN_MPI, "MASTER_PORT", "x"),
    (MPICH, "PMI_RANK", "5"),
    (MPICH, "PMI_SIZE", "x"),
]


@pytest.mark.parametrize(("env", "name", "value"), WRONG, ids=[f"{name}={value[:8]}" for _, name, value in WRONG])
def test_a_wrong_variable_is_named(env: dict[str, str], name: str, value: str) -> None:
    with pytest.raises(TopologyError) as refusal:
        detect_launch({**env, name: value})
    assert refusal.value.where == f"environment: {name}"
    assert refusal.value.exit_code == 2
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("name", ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(name: str) -> None:
    with pytest.raises(TopologyError, match=name):
        detect_launch({each: value for each, value in TORCHRUN.items() if each != name})


def test_right_variables() -> None:
    assert detect_launch(TORCHRUN) == Launch("torchrun", 1, 2, 1, "n0", 29500)
    assert detect_launch(SLURM) == Launch("slurm", 1, 2, 1, "127.0.0.1", 20007)
    assert detect_launch({**SLURM, "MASTER_ADDR": "n0", "MASTER_PORT": "5"}) == Launch("slurm", 1, 2, 1, "n0", 5)
    assert detect_launch({}) == Launch("single", 0, 1, 0, "127.0.0.1", 0)
