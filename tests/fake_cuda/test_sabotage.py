"""The tests of this folder fail when the project waits, computes or communicates as it should not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.fake_cuda import sabotage
from tests.fake_cuda.cases import PLAIN
from tests.fake_cuda.judge import problems
from tests.fake_cuda.server import CaseFailure, Server


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (sabotage.cpu_tensor_in_a_collective, "collective: all_reduce on cpu at exo_megatron/training/step.py"),
        (
            sabotage.strided_tensor_in_a_collective,
            "collective: all_reduce not contiguous at exo_megatron/training/step.py",
        ),
        (sabotage.item_in_the_loss, "1 more waits for the device, gradients: item at"),
        (sabotage.item_in_the_backward, "1 more waits for the device, gradients: item at"),
        (sabotage.copy_in_every_layer, "operators per layer instead of"),
    ],
)
def test_found(change: object, found: str, server: Server) -> None:
    lines = problems(PLAIN, server.find(PLAIN, getattr(change, "__name__", None)))
    assert len(lines) == 1
    assert found in lines[0]


def test_a_case_that_raises(server: Server) -> None:
    with pytest.raises(CaseFailure, match="KeyError: 'no such family'"):
        server.find(replace(PLAIN, family="no such family"))
