"""What passes through the model more than once does so on CUDA tensors, too: oversized groups, rollout, scoring."""

from __future__ import annotations

import pytest

from tests.fake_cuda.cases import Case, chosen
from tests.fake_cuda.judge import problems
from tests.fake_cuda.server import Server


@pytest.mark.parametrize("case", chosen("train_oversized", "decode", "score"), ids=lambda case: case.name)
def test_case(case: Case, server: Server) -> None:
    assert problems(case, server.find(case)) == []
