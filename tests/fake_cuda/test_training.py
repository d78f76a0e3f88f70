"""The project's training step runs on CUDA tensors without data, with the CPU build of torch.

CI runs a third of the cases. All of them:

    EXO_FAKE_CUDA=all python -m pytest tests/fake_cuda
"""

from __future__ import annotations

import pytest

from tests.fake_cuda.cases import CASES, Case, chosen
from tests.fake_cuda.expected import FIGURES
from tests.fake_cuda.judge import problems
from tests.fake_cuda.server import Server


@pytest.mark.parametrize("case", chosen("train"), ids=lambda case: case.name)
def test_case(case: Case, server: Server) -> None:
    assert problems(case, server.find(case)) == []


def test_every_case_has_its_figures() -> None:
    assert set(FIGURES) == {case.name for case in CASES}
