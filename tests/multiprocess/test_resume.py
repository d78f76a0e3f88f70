"""`align` killed and started again gives the losses and the weights of an undisturbed run, bit for bit (CPU, fp32)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from exo_megatron.checkpoint.directory import list_steps, weights_path
from exo_megatron.checkpoint.tensors import StoredTensors
from tests.multiprocess.align_case import MAX_TOKENS, objective, reward_groups, write_records
from tests.multiprocess.harness import Check, Outcome, kill_group, run_checks, start_group, wait_group
from tests.reference.tiny_llama import save_hf, tiny_config, tiny_llama
from tests.reference.weights import perturbed

STEPS = 15  # 9 groups, 2 per step: three epochs of 5 steps, the last of each with one group
INTERVAL = 3
START_SECONDS = 180.0
TRY_AGAIN = 75
CHECKS = "tests.multiprocess.resume_checks"

Topology = dict[str, int]
SINGLE: Topology = {}
TENSOR: Topology = {"tensor": 2}
PIPELINE: Topology = {"pipeline": 2}

# Tied embeddings have a gradient bucket of their own on several stages. megatron-core pads parameters to 64 elements
# and buckets to 128; the tied model's first stage has an odd number of 64s before its embeddings.
SIZES = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2}
MODELS = {"untied": tiny_config(), "tied": tiny_config(tied=True, **SIZES)}


def config(root: Path, output: str, parallel: Topology, model: str = "untied") -> dict[str, Any]:
    """Everything that has a state or a schedule is on: warm-up and cosine decay, Adam, clipping, shuffled epochs."""
    loss = objective("exo_rw")
    return {
        "output": str(root / output),
        "seed": 3,
        "model": {"checkpoint": str(root / f"policy-{model}")},
        "reference": {"checkpoint": str(root / f"reference-{model}")},
        "data": {"path": str(root / "rewards.jsonl")},
        "loss": {"beta_pi": loss.beta_pi, "beta_r": loss.beta_r, "temperature": loss.temperature},
        "parallel": parallel,
        "compute": {"precision": "fp32", "max_tokens_per_microbatch": MAX_TOKENS},
        "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 4, "weight_decay": 0.1},
        "batch": {"groups": 2, "epochs": 3},
        "save": {"interval": INTERVAL},
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("resume")
    for name, sizes in MODELS.items():
        reference = tiny_llama(sizes, seed=31)
        save_hf(reference, directory / f"hf-reference-{name}")
        save_hf(perturbed(reference, seed=32, scale=0.05), directory / f"hf-policy-{name}")
    write_records(directory / "rewards.jsonl", reward_groups(seed=7), fields="rewards")
    return directory


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> dict[str, Outcome]:
    """Runs from start to end at every topology, and runs in pieces inside one process."""
    imports = [
        Check(
            f"import-{name}",
            "tests.multiprocess.align_checks:import_checkpoint",
            {"hf": root / f"hf-{name}", "output": root / name},
        )
        for name in (f"{role}-{model}" for role in ("policy", "reference") for model in MODELS)
    ]
    outcomes = run_checks(1, [*imports, in_pieces(root, "single", SINGLE, [])], root / "workers")
    checks = [
        in_pieces(root, "data", SINGLE, []),
        in_pieces(root, "tensor", TENSOR, []),
        in_pieces(root, "pipeline", PIPELINE, []),
        in_pieces(root, "tensor-pieces", TENSOR, [(TENSOR, 5), (TENSOR, 1), (TENSOR, 7)]),
        in_pieces(root, "pipeline-pieces", PIPELINE, [(PIPELINE, 4)]),
        in_pieces(root, "tied", PIPELINE, [], "tied"),
        in_pieces(root, "tied-pieces", PIPELINE, [(PIPELINE, 4)], "tied"),
        in_pieces(root, "moved", PIPELINE, [(TENSOR, 4), (SINGLE, 5)]),
        Check("diverging", f"{CHECKS}:error_of", {"config": config(root, "diverged", SINGLE), "nan_step": 5}),
        in_pieces(root, "diverged", SINGLE, []),
        Check("memory", f"{CHECKS}:saved_bytes", {"config": config(root, "memory", SINGLE)}),
        Check("other-lr", f"{CHECKS}:error_of", {"config": other_lr(root, "diverged")}),
    ]
    return outcomes | run_checks(2, checks, root / "workers")


def in_pieces(
    root: Path, output: str, parallel: Topology, pieces: list[tuple[Topology, int]], model: str = "untied"
) -> Check:
    """A run into `output` that crashes after each of the pieces, (topology, steps), and ends at `parallel`."""
    arguments = {
        "pieces": [(config(root, output, topology, model), steps) for topology, steps in pieces],
        "last": config(root, output, parallel, model),
    }
    return Check(output, f"{CHECKS}:align_in_pieces", arguments)


def other_lr(root: Path, output: str) -> dict[str, Any]:
    settings = config(root, output, SINGLE)
    settings["optimizer"]["lr"] = 2e-3
    return settings


def metrics(output: Path) -> list[dict[str, Any]]:
    """Every record, without what depends on the clock."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in records]


def final_state(output: Path) -> dict[str, Tensor]:
    """Weights and optimizer state of the last checkpoint."""
    step, checkpoint = list_steps(output)[-1]
    assert step == STEPS
    tensors = StoredTensors(weights_path(checkpoint))
    return {key: tensors.read(key) for key in tensors.keys()}  # noqa: SIM118 - not a dict


def assert_same_run(resumed: Path, whole: Path) -> None:
    expected = metrics(whole)
    assert [record["step"] for record in expected] == list(range(1, STEPS + 1))
    assert len({record["loss"] for record in expected}) == STEPS
    assert metrics(resumed) == expected
    ours, theirs = final_state(resumed), final_state(whole)
    assert ours.keys() == theirs.keys()
    assert any(key.startswith("optimizer.") for key in theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


class Launch:
    """`python -m exo_megatron align` in one or more processes, as a launcher would start it."""

    def __init__(self, root: Path, output: str, world_size: int) -> None:
        self.output = root / output
        self.folder = root / f"{output}-logs"
        self.folder.mkdir(exist_ok=True)
        file = self.folder / "align.yaml"
        file.write_text(yaml.safe_dump(config(root, output, SINGLE)), encoding="utf-8")
        command = [sys.executable, "-m", "exo_megatron", "align", "--config", str(file)]
        self.processes = start_group(world_size, command, self.folder)

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Poll until something is seen in the output directory; the run must still be going on."""
        deadline = time.monotonic() + START_SECONDS
        while not reached():
            codes = [process.poll() for process in self.processes]
            assert codes == [None] * len(codes), f"ended too early with {codes}:\n{self.log()}"
            assert time.monotonic() < deadline, f"not reached:\n{self.log()}"
            time.sleep(0.002)

    def steps_logged(self) -> int:
        path = self.output / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        complete = [json.loads(line) for line in lines if line.endswith("\n")]
        return complete[-1]["step"] if complete else 0

    def saving(self, step: int) -> bool:
        """Whether a checkpoint of this step or a later one is being written."""
        staging = (self.output / "checkpoints").glob("tmp-step-*")
        return any(int(path.name.rpartition("-")[2]) >= step for path in staging)

    def kill(self) -> None:
        """SIGKILL to every process, and a look at what they left: no end, no mark of one."""
        kill_group(self.processes)
        assert [process.returncode for process in self.processes] == [-signal.SIGKILL] * len(self.processes)
        assert not (self.output / "stage.json").exists()
        assert list_steps(self.output)[-1][0] < STEPS

    def finish(self) -> None:
        problem = wait_group(self.processes, START_SECONDS)
        assert problem is None, f"{problem}\n{self.log()}"
        assert json.loads((self.output / "stage.json").read_text(encoding="utf-8"))["status"] == "complete"

    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.folder.glob("rank*.log")))


def exit_codes(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    return [process.wait(timeout=START_SECONDS) for process in processes]


def test_killed_between_saves_and_in_a_save(root: Path, undisturbed: dict[str, Outcome]) -> None:
    """One process: SIGKILL after two steps that were logged but not saved, then SIGKILL inside a save."""
    undisturbed["single"].values()
    first = Launch(root, "single-killed", 1)
    first.wait_until(lambda: first.steps_logged() >= INTERVAL + 2 and bool(list_steps(first.output)))
    first.kill()
    second = Launch(root, "single-killed", 1)
    second.wait_until(lambda: second.saving(3 * INTERVAL))
    second.kill()
    Launch(root, "single-killed", 1).finish()
    assert_same_run(root / "single-killed", root / "single")


def test_killed_and_asked_to_stop_with_two_processes(root: Path, undisturbed: dict[str, Outcome]) -> None:
    """Data parallel: SIGKILL to both ranks, then SIGTERM to rank 1 alone: both save and end with 75, to be resumed."""
    undisturbed["data"].values()
    first = Launch(root, "data-killed", 2)
    first.wait_until(lambda: first.steps_logged() >= INTERVAL + 2 and bool(list_steps(first.output)))
    first.kill()
    second = Launch(root, "data-killed", 2)
    second.wait_until(lambda: second.steps_logged() >= 2 * INTERVAL + 1)
    os.kill(second.processes[1].pid, signal.SIGTERM)
    assert exit_codes(second.processes) == [TRY_AGAIN, TRY_AGAIN], second.log()
    assert not (second.output / "stage.json").exists()
    Launch(root, "data-killed", 2).finish()
    assert_same_run(root / "data-killed", root / "data")


def test_ctrl_c_saves_and_a_complete_stage_does_no_work(root: Path, undisturbed: dict[str, Outcome]) -> None:
    """A terminal sends SIGINT to all processes: all save and end with 75; the next run says where it goes on."""
    undisturbed["data"].values()
    first = Launch(root, "interrupted", 2)
    first.wait_until(lambda: first.steps_logged() >= INTERVAL + 1)
    for process in first.processes:
        os.kill(process.pid, signal.SIGINT)
    assert exit_codes(first.processes) == [TRY_AGAIN, TRY_AGAIN], first.log()
    assert "Traceback" not in first.log()
    saved = list_steps(first.output)[-1][0]
    second = Launch(root, "interrupted", 2)
    second.finish()
    assert f"align: goes on after step {saved}, from {first.output}/checkpoints/" in second.log()
    assert_same_run(root / "interrupted", root / "data")
    before = {path: path.stat().st_mtime_ns for path in first.output.rglob("*")}
    third = Launch(root, "interrupted", 2)
    third.finish()
    done = f"align: complete already in {first.output} with this configuration (inputs are not compared), nothing to do"
    assert done in third.log()
    assert {path: path.stat().st_mtime_ns for path in first.output.rglob("*")} == before


@pytest.mark.parametrize("parallel", ["tensor", "pipeline", "tied"])
def test_stopped_in_the_middle_of_model_parallel_runs(
    parallel: str, root: Path, undisturbed: dict[str, Outcome]
) -> None:
    undisturbed[parallel].values()
    undisturbed[f"{parallel}-pieces"].values()
    assert_same_run(root / f"{parallel}-pieces", root / parallel)


def test_moved_to_other_topologies(root: Path, undisturbed: dict[str, Outcome]) -> None:
    """TP2, then DP2, then PP2: another order of sums, so equal to rounding, not to the bit."""
    undisturbed["moved"].values()
    expected = metrics(root / "single")
    for ours, theirs in zip(metrics(root / "moved"), expected, strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert list_steps(root / "moved")[-1][0] == STEPS


def test_every_rank_saves_its_own_share(undisturbed: dict[str, Outcome]) -> None:
    """Two copies of the model: weights, fp32 copies and moments are written by the two half and half, and once."""
    (first,), (second,) = undisturbed["memory"].values()
    parameters = sum(parameter.numel() for parameter in tiny_llama(MODELS["untied"], seed=0).parameters())
    assert 4 * 4 * parameters <= first + second < 1.1 * 4 * 4 * parameters  # with rows that pad the vocabulary
    assert 0.4 < first / (first + second) < 0.6


def test_nan_on_one_rank_stops_all_on_the_same_step(root: Path, undisturbed: dict[str, Outcome]) -> None:
    """Nothing is saved from that step, and the run goes on from the checkpoint before it as if nothing had been."""
    first, second = undisturbed["diverging"].values()
    assert first == second
    kind, message, code = first
    assert kind == "TrainingDiverged" and message.startswith("step 5: loss nan") and code == 1
    undisturbed["diverged"].values()
    assert_same_run(root / "diverged", root / "data")


def test_resuming_with_other_settings_is_refused(root: Path, undisturbed: dict[str, Outcome]) -> None:
    for kind, message, code in undisturbed["other-lr"].values():
        assert kind == "CheckpointError" and code == 2
        assert "other data, loss, optimizer or batch settings" in message
