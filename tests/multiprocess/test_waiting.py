"""Forward and backward of a step: the host never waits for the device."""

from __future__ import annotations

import pytest
import torch

from tests.multiprocess.harness import Check, run_checks
from tests.multiprocess.waiting_checks import Watch

FUNCTION = "tests.multiprocess.waiting_checks:waits_of_a_step"
CASES = {
    "kept": {"max_tokens": 2048, "logits_memory_mib": 1024.0},
    "recomputed": {"max_tokens": 2048, "logits_memory_mib": 0.0},
    "in parts": {"max_tokens": 700, "logits_memory_mib": 1024.0},
}


@pytest.fixture(scope="module")
def waits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    checks = [Check(name, FUNCTION, arguments) for name, arguments in CASES.items()]
    outcomes = run_checks(1, checks, tmp_path_factory.mktemp("waiting"))
    return {name: outcome.values()[0] for name, outcome in outcomes.items()}


@pytest.mark.parametrize("name", CASES)
def test_nothing_waits(waits: dict[str, list[str]], name: str) -> None:
    *callers, work = waits[name]
    assert work.startswith("0 oversized") == (name != "in parts")
    assert callers == []


@pytest.mark.parametrize("wait", ["item", "nonzero", "tolist", "bool", "mask"])
def test_watch_sees_what_waits(wait: str) -> None:
    tensor = torch.tensor([1.0, 0.0])
    operations = {
        "item": lambda: tensor[0].item(),
        "nonzero": lambda: tensor.nonzero(),
        "tolist": lambda: tensor.tolist(),
        "bool": lambda: bool(tensor[0] > 0),
        "mask": lambda: tensor[tensor > 0],
    }
    with Watch() as watch:
        operations[wait]()
    assert watch.callers
