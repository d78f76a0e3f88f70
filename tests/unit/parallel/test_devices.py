"""Which CUDA device a process takes, whatever launched it, and what processes without one of their own are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from exo_megatron.errors import TopologyError
from exo_megatron.parallel import runtime
from exo_megatron.parallel.launch import Launch, Launcher, detect_launch
from exo_megatron.parallel.runtime import Seat, check_seats, distributed_runtime

LAUNCHERS: tuple[Launcher, ...] = ("torchrun", "slurm", "mpi")


class Devices:
    """A fake CUDA with so many visible devices; `chosen` is what `set_device` was given."""

    def __init__(self, count: int, prefix: str = "") -> None:
        self.count, self.prefix = count, prefix
        self.chosen: list[torch.device] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Devices:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: self.count)
        monkeypatch.setattr(torch.cuda, "set_device", self.chosen.append)
        monkeypatch.setattr(torch.cuda, "get_device_properties", self.properties)
        return self

    def properties(self, device: torch.device) -> Any:
        if device.index >= self.count:
            raise AssertionError("Invalid device id")

        class Properties:
            uuid = f"{self.prefix}{device.index}"

        return Properties()


def launch(launcher: Launcher, local_rank: int) -> Launch:
    return Launch(launcher, local_rank, 8, local_rank, "127.0.0.1", 1)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("local_rank", [0, 1, 7])
def test_the_only_visible_device_is_number_0(
    monkeypatch: pytest.MonkeyPatch, launcher: Launcher, local_rank: int
) -> None:
    devices = Devices(1).install(monkeypatch)
    assert runtime._choose_device(launch(launcher, local_rank)) == torch.device("cuda", 0)
    assert devices.chosen == [torch.device("cuda", 0)]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_of_several_devices_each_process_takes_that_of_its_local_rank(
    monkeypatch: pytest.MonkeyPatch, launcher: Launcher
) -> None:
    devices = Devices(4).install(monkeypatch)
    for local_rank in range(4):
        assert runtime._choose_device(launch(launcher, local_rank)) == torch.device("cuda", local_rank)
    assert devices.chosen == [torch.device("cuda", local_rank) for local_rank in range(4)]


def test_srun_with_one_gpu_per_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the variables of srun on, also with torchrun in every task, whose local ranks are all 0."""
    Devices(1).install(monkeypatch)
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1", "SLURM_JOB_ID": "7"}
    task = detect_launch({**step, "SLURM_PROCID": "3", "SLURM_LOCALID": "3"})
    assert (task.launcher, task.local_rank, runtime._choose_device(task).index) == ("slurm", 3, 0)
    inner = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    nested = detect_launch({**step, **inner, "SLURM_PROCID": "3", "SLURM_LOCALID": "3"})
    assert (nested.launcher, runtime._choose_device(nested).index) == ("torchrun", 0)


def test_without_cuda_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device = runtime._choose_device(launch("slurm", 5))
    assert device == torch.device("cpu")
    assert runtime._take_seat(device, None).gpu is None


def seats_of(monkeypatch: pytest.MonkeyPatch, worlds: list[tuple[str, Devices, int]]) -> list[Seat]:
    """The seats of processes: node, the devices that it sees, local rank."""
    seats = []
    for host, devices, local_rank in worlds:
        devices.install(monkeypatch)
        monkeypatch.setattr(runtime.socket, "gethostname", lambda host=host: host)
        seats.append(runtime._take_seat(runtime._choose_device(launch("torchrun", local_rank)), None))
    return seats


def test_a_device_for_each_process_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    check_seats(seats_of(monkeypatch, [("n1", Devices(2, "n1"), 0), ("n1", Devices(2, "n1"), 1)]))
    bound = [(host, Devices(1, f"{host}-{task}-"), task) for host in ("n1", "n2") for task in range(3)]
    check_seats(seats_of(monkeypatch, bound))
    check_seats([Seat("n1", None, None)] * 5)  # any number of processes share a CPU


@pytest.mark.parametrize("visible", [1, 2])
def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch, visible: int) -> None:
    """With one visible device nothing but its identity tells it from the device of another process."""
    shared = Devices(visible)
    seats = seats_of(monkeypatch, [("n1", shared, local_rank) for local_rank in range(3)])
    assert all(device.index < visible for device in shared.chosen)  # CUDA refuses a number that is not there
    assert [seat.gpu for seat in seats] == (["0", "0", "0"] if visible == 1 else ["0", "1", ""])
    with pytest.raises(TopologyError) as refusal:
        check_seats([Seat("n0", "another", None), *seats])
    assert "node n1" in refusal.value.where
    assert f"3 processes, which see {visible} different CUDA devices" in refusal.value.problem
    assert f"at most {visible} processes" in refusal.value.expected
    assert f"--nproc-per-node {visible}," in refusal.value.fix


def test_seats_are_checked_when_the_world_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_take_seat", lambda device, failure: Seat("n1", "", failure))
    try:
        with (
            pytest.raises(TopologyError, match="1 processes, which see 0 different"),
            distributed_runtime(models=False),
        ):
            pytest.fail("joined")
    finally:
        torch.distributed.destroy_process_group()


def test_transformer_engine_on_some_ranks_only() -> None:
    whole, broken = Seat("n1", "1", None), Seat("n2", "2", "OSError: no libcudart")
    check_seats([whole, Seat("n2", "3", None)])
    check_seats([broken, Seat("n3", "4", "ImportError: otherwise")])
    with pytest.raises(TopologyError) as refusal:
        check_seats([whole, broken])
    assert refusal.value.where == "rank 1, node n2"
    assert "OSError: no libcudart" in refusal.value.problem
