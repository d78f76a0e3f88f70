"""Doctor's two processes: a sum that is right, and each way in which there is none."""

from __future__ import annotations

import multiprocessing

from exo_megatron.parallel import doctor


def test_two_processes_add_up():
    found = doctor.try_collective("gloo")
    assert found.state == "ok", found
    assert "all-reduce in" in found.detail


def test_processes_that_do_not_answer_in_time_are_stopped():
    found = doctor.try_collective("gloo", limit=0.2)
    assert found.state == "broken"
    assert "rank 0: no answer within the time limit" in found.detail
    assert "GLOO_SOCKET_IFNAME" in found.advice
    assert multiprocessing.active_children() == []


def test_what_goes_wrong_is_told(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # without a device there is no NCCL
    found = doctor.try_collective("nccl")
    assert found.state == "broken"
    assert "rank 1: " in found.detail
    assert "NCCL_SOCKET_IFNAME" in found.advice
