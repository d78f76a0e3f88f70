"""The project's CUDA branches run with numbers, on a CUDA device that computes on the CPU, and are compared.

No branch is patched: the tensors are on "cuda". CI runs what shows every operator and every sabotage once, in one world
of two ranks. All cases of tests/multiprocess/test_align_parity.py:

    EXO_FAKE_CUDA=all python -m pytest tests/emulated_cuda
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.emulated_cuda.libraries import build_worker, fetch_engine, with_engine
from tests.fake_cuda.libraries import folder_of_run, reason_without_device
from tests.multiprocess import test_align_parity as parity
from tests.multiprocess.align_case import CASES, FEWEST_TOKENS, ROUGH_CASES, Case
from tests.multiprocess.harness import Check, Outcome, run_checks
from tests.unit.models.attention.test_kernels import LAYOUTS

HERE = "tests.emulated_cuda"
ALL = os.environ.get("EXO_FAKE_CUDA") == "all"
# With two copies of the model, whose gradients are reduced while the backward pass runs, and cut in two.
TP1, TP2 = Case(1, 1, 2), Case(2, 1, 1, recompute="selective")
IN_CI = [TP1, TP2, replace(TP2, max_tokens=FEWEST_TOKENS)]
EXACT = [*IN_CI, *(case for case in CASES if case not in IN_CI)] if ALL else IN_CI
# In fp32, with the flash operator, which takes it in the emulation only, and by matrix products, as on a GPU.
RUNS = [*((case, True) for case in EXACT), *((case, False) for case in IN_CI if ALL)]
# The same with the linears and the Adam of Transformer Engine's Python.
ENGINE = IN_CI
ROUGH = [Case(2, 1, 1, precision="bf16"), *(ROUGH_CASES if ALL else [])]
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

# What each sabotage is told by.
FOUND = {
    "transposed log-sum-exps": "softmax_lse must be [heads, tokens]",
    "cumulative lengths in int64": "cu_seqlens_k must have dtype int32",
    "cumulative lengths on the host": "cu_seqlens_q must be on CUDA",
    "a scale dropped in the merge": "output: ",
    "equal shares in the merge": "output: ",
    "a sign of the query's gradient": "q: ",
    "a sign of the key's gradient": "k: ",
    "the log-sum-exp of one pass": "q: ",
}
REFUSED = {
    "int64 bounds": "cu_seqlens_q must have dtype int32",
    "bounds on the CPU": "cu_seqlens_k must be on CUDA",
    "bounds of fewer tokens": "cu_seqlens_q goes from 0 to 5, not from 0 to 6",
    "maximum below a length": "cu_seqlens_q has a length of 4, above the maximum 3",
    "query on the CPU": "query must be on CUDA",
    "strided last dimension": "must have contiguous last dimension",
    "fp64": "only support fp16 and bf16",
    "dtypes that differ": "query and value must have the same dtype",
    "heads of 12": "head_size must be a multiple of 8",
    "heads of 264": "head dimension at most 256",
    "heads that do not divide": "must divide number of heads in query",
    "one query, a block without": "is invalid for 1 queries",
    "dropout": "dropout",
    "transposed sums": "softmax_lse must be [heads, tokens] (4, 6), not (6, 4)",
    "strided sums": "softmax_lse must be contiguous",
    "half-precision sums": "softmax_lse must be fp32",
    "output of another dtype": "query and out must have the same dtype",
    "gradient of another shape": "dout must have shape",
    "product of two dtypes": "input dtypes must be the same",
    "product of fp32 in bf16": "out_dtype must be the same as input dtype or fp32",
    "product with the CPU": "Expected all tensors to be on the same device",
    "sum with the CPU": "Expected all tensors to be on the same device",
}


class Worlds:
    """Starts the world of each size when the first test asks for it."""

    def __init__(self, folder: Path, libraries: Path) -> None:
        self.folder = folder
        with ThreadPoolExecutor() as beside:
            worker = beside.submit(build_worker, libraries)
            parity.write_inputs(folder)
            self.worker = worker.result()
        self.outcomes: dict[int, dict[str, Outcome]] = {}

    def values(self, name: str, world_size: int = 2) -> tuple[Any, ...]:
        """What each rank returned."""
        for size in sorted({2, world_size}, key=lambda size: size != 2):  # that of two ranks imports the models
            if size not in self.outcomes:
                folder = self.folder / "workers"
                self.outcomes[size] = run_checks(size, self._checks(size), folder, worker=self.worker)
        return self.outcomes[world_size][name].values()

    def _checks(self, size: int) -> list[Check]:
        checks = _imports(self.folder) + _attention() + _others() if size == 2 else []
        for case, flash in [*RUNS, *((case, False) for case in ROUGH)]:
            if case.world_size == size:
                checks.append(_stage(case, self.folder, flash=flash))
        return checks


def _stage(case: Case, folder: Path, *, flash: bool, engine: bool = False) -> Check:
    name = f"{_name(case, flash)}{'_engine' if engine else ''}"
    arguments = {
        "name": "sft" if case.kind == "sft" else "align",
        "config": {**parity.stage_config(case, folder), "output": folder / "runs" / name},
        "flash": flash,
        "engine": engine,
    }
    return Check(name, f"{HERE}.checks:stage", arguments)


def _name(case: Case, flash: bool) -> str:
    return f"{case.name}{'_flash' if flash else ''}"


def _imports(folder: Path) -> list[Check]:
    names = {f"{model}-{'tied' if case.tied else 'untied'}" for case in EXACT for model in ("policy", "reference")}
    function = "tests.multiprocess.align_checks:import_checkpoint"
    return [Check(name, function, {"hf": folder / f"hf-{name}", "output": folder / name}) for name in sorted(names)]


def _attention() -> list[Check]:
    checks = []
    for layout in LAYOUTS:
        for dtype, tolerance in DTYPES.items():
            for flash in (True, False) if dtype == torch.float32 else (False,):
                arguments = {"layout": layout, "dtype": dtype, "tolerance": tolerance, "flash": flash}
                name = f"{layout}, {dtype}{', flash' if flash else ''}"
                checks.append(Check(name, f"{HERE}.checks:attention", arguments))
    return checks


def _others() -> list[Check]:
    checks = [Check(name, f"{HERE}.checks:{name}", {}) for name in ("windows", "products", "experts", "refusals")]
    return checks + [Check(name, f"{HERE}.checks:sabotaged", {"name": name}) for name in FOUND]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    reason = reason_without_device()
    if reason is not None:
        pytest.skip(reason)
    return Worlds(tmp_path_factory.mktemp("emulated"), folder_of_run(tmp_path_factory))


def by_name(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("check", _attention(), ids=lambda check: check.name)
def test_attention(check: Check, worlds: Worlds) -> None:
    worlds.values(check.name)


def test_attention_in_a_window(worlds: Worlds) -> None:
    worlds.values("windows")


def test_products(worlds: Worlds) -> None:
    """Half-precision operands, sums in fp32: 300 products each are exact to 1e-5, and to 1e-2 if rounded to bf16."""
    for errors in worlds.values("products"):
        assert max(errors.values()) < 1e-5, errors


def test_experts(worlds: Worlds) -> None:
    """Activations are rounded to bf16 three times on the way."""
    for errors in worlds.values("experts"):
        assert max(errors.values()) < 2e-2, errors


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, worlds: Worlds) -> None:
    assert REFUSED[what] in worlds.values("refusals")[0][what]


def test_every_call_is_refused(worlds: Worlds) -> None:
    assert worlds.values("refusals")[0].keys() == REFUSED.keys()


@pytest.mark.parametrize("sabotage", FOUND)
def test_sabotage_is_found(sabotage: str, worlds: Worlds) -> None:
    assert FOUND[sabotage] in worlds.values(sabotage)[0]


@pytest.mark.parametrize(("case", "flash"), RUNS, ids=lambda value: value.name if isinstance(value, Case) else None)
def test_parity(case: Case, flash: bool, worlds: Worlds) -> None:
    _agrees(case, worlds.values(_name(case, flash), case.world_size))


def _agrees(case: Case, records: Sequence[Any]) -> None:
    """Loss and gradients to 1e-5 of plain PyTorch's, and the weights as the parity test has it."""
    errors = parity.margins(case, records)
    assert errors["loss"] < 1e-5, errors
    assert errors["gradients"] < 1e-5, errors
    assert errors["weights in steps"] < parity.WEIGHT_TOLERANCE / parity.LR, errors


@pytest.mark.parametrize("case", ROUGH, ids=by_name)
def test_bf16(case: Case, worlds: Worlds) -> None:
    parity.follows_roughly(case, worlds.values(_name(case, flash=False), case.world_size))


@pytest.mark.skipif(not ALL, reason="only with EXO_FAKE_CUDA=all: the package index is asked for Transformer Engine")
def test_parity_with_transformer_engine(worlds: Worlds) -> None:
    folder = worlds.folder / "engine"
    folder.mkdir()
    reason = fetch_engine(folder)
    if reason is not None:
        pytest.skip(reason)
    worlds.values("refusals")  # the checkpoints are imported
    checks = [_stage(case, worlds.folder, flash=True, engine=True) for case in ENGINE]
    outcomes = run_checks(2, checks, worlds.folder / "engine-workers", worker=with_engine(worlds.worker, folder))
    for case, check in zip(ENGINE, checks, strict=True):
        _agrees(case, outcomes[check.name].values())
