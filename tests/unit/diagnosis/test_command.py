"""`exo-megatron doctor --gpu`: the small version on the CPU, its table, file and exit codes, and its options."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from exo_megatron.cli.doctor_options import parse_doctor_options
from exo_megatron.cli.main import main
from exo_megatron.diagnosis import run
from exo_megatron.diagnosis.checklist import SIZES
from exo_megatron.diagnosis.checks import DeviceCheck, Outcome
from exo_megatron.errors import ConfigError

CORRECTNESS = {
    "attention in fp32",
    "attention in bf16",
    "log-probs in bf16",
    *(
        f"{name} in {precision}"
        for precision in ("fp32", "bf16")
        for name in (
            "checkpoint made on the CPU",
            "step",
            "greedy decoding",
            "save and resume",
            "step of a mixture of experts",
        )
    ),
}
SPEED = {
    "step of a 0.4M model",
    *(f"sharing at {shape}" for shape in SIZES["cpu"].speed.shapes),
    "decoding of a 0.5M model at K=8",
}
SPEED_OF_ITS_OWN = {"peak memory of a step", "host time of a layer"}


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which the command sets for good
    yield
    if dist.is_initialized():  # a failed run leaves it to the end of the process
        dist.destroy_process_group()


def test_the_small_version_passes_on_the_cpu(on_cpu, tmp_path, capsys):
    file = tmp_path / "results.json"
    started = time.process_time()
    assert main(["doctor", "--gpu", "--cpu", "--json", str(file), "--minutes", "60"]) == 0
    assert time.process_time() - started < 60
    written = json.loads(file.read_text())
    verdicts = {result["check"]: result["verdict"] for result in written["results"]}
    assert set(verdicts) == CORRECTNESS | SPEED | SPEED_OF_ITS_OWN
    assert {verdicts[name] for name in CORRECTNESS} == {"passed"}
    assert {verdicts[name] for name in SPEED | SPEED_OF_ITS_OWN} <= {"passed", "slower than expected"}
    assert written["environment"]["device"].startswith("CPU")
    assert written["environment"]["torch"]
    printed = capsys.readouterr()
    assert all(name in printed.out for name in verdicts)
    assert "doctor: 21/21 checks" in printed.err


def test_without_a_gpu_the_command_says_what_to_do(capsys):
    assert main(["doctor", "--gpu"]) == 2
    error = capsys.readouterr().err
    assert "no CUDA device" in error
    assert "--cpu" in error


@pytest.mark.parametrize(
    ("verdicts", "code"), [(("passed", "slower than expected", "not run (time)"), 0), (("passed", "failed"), 1)]
)
def test_only_a_failed_check_changes_the_exit_code(on_cpu, monkeypatch, capsys, verdicts, code):
    checks = [
        DeviceCheck(verdict, lambda: 0.0, lambda verdict=verdict: Outcome(verdict, "1", "2")) for verdict in verdicts
    ]
    monkeypatch.setattr(run, "make_site", lambda *arguments: None)
    monkeypatch.setattr(run, "correctness_checks", lambda *arguments: checks)
    monkeypatch.setattr(run, "speed_checks", lambda *arguments: [])
    assert main(["doctor", "--gpu", "--cpu"]) == code
    assert capsys.readouterr().out.splitlines()[-1] == ", ".join(f"1 {verdict}" for verdict in verdicts) + "."


def test_a_file_that_cannot_be_written_is_told_before_the_work(on_cpu, tmp_path, capsys):
    assert main(["doctor", "--gpu", "--cpu", "--json", str(tmp_path)]) == 2
    assert "--json" in capsys.readouterr().err


def test_options():
    given = parse_doctor_options(["--gpu", "--minutes=1.5", "--json", "x.json"])
    assert (given.gpu, given.cpu, given.json, given.minutes) == (True, False, Path("x.json"), 1.5)
    assert parse_doctor_options([]).gpu is False
    assert parse_doctor_options(["--gpu"]).minutes == 4


@pytest.mark.parametrize(
    "words",
    [
        ["--cpu"],
        ["--json", "x"],
        ["--gpu", "--json"],
        ["--gpu", "--json", "a", "--json", "b"],
        ["--gpu", "--minutes", "0"],
        ["--gpu", "--minutes", "long"],
        ["--gpu=yes"],
        ["--gpus"],
        ["output=x"],
    ],
)
def test_wrong_options_are_told(words):
    with pytest.raises(ConfigError):
        parse_doctor_options(words)
