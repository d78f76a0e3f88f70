"""The project's training step, rollout and scoring run on CUDA tensors without data, with the CPU build of torch.

CI runs a third of the cases. All of them:

    EXO_FAKE_CUDA=all python -m pytest tests/fake_cuda
"""

from __future__ import annotations

import os

import pytest

from tests.fake_cuda.cases import CASES, Case
from tests.fake_cuda.expected import FIGURES
from tests.fake_cuda.judge import problems
from tests.fake_cuda.server import Server

ALL = os.environ.get("EXO_FAKE_CUDA") == "all"


@pytest.mark.parametrize("case", [case for case in CASES if ALL or case.in_ci], ids=lambda case: case.name)
def test_case(case: Case, server: Server) -> None:
    assert problems(case, server.find(case)) == []


def test_every_case_has_its_figures() -> None:
    assert set(FIGURES) == {case.name for case in CASES}
