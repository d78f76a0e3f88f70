"""The tests of this folder fail when the project waits, computes or communicates as it should not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.fake_cuda.cases import PLAIN
from tests.fake_cuda.judge import problems
from tests.fake_cuda.server import CaseFailure, Server

FOUND = {
    "cpu_tensor_in_a_collective": ["collective: all_reduce on cpu at"],
    "strided_tensor_in_a_collective": ["collective: all_reduce not contiguous at"],
    "item_in_the_loss": ["1 more waits for the device, gradients: item at"],
    "item_in_the_backward": ["1 more waits for the device, gradients: item at"],
    "norm_read_by_the_host": ["1 more waits for the device, optimizer: item at"],
    "copy_in_every_layer": ["operators per layer instead of"],
    "number_from_the_host": ["1 copies to the device not made ahead, gradients", "copies to the device instead of"],
    "copy_that_nobody_waits_for": ["unsafe: gradients: does not wait for a copy"],
    "copy_that_is_not_shared": ["unsafe: gradients: a copy whose memory its stream may use again"],
    "whole_weight_gradient": ["fp32 matrix of", "operators per layer instead of"],
}
LARGE = replace(PLAIN, family="large")


@pytest.mark.parametrize("sabotage", FOUND)
def test_found(sabotage: str, server: Server) -> None:
    case = LARGE if sabotage == "whole_weight_gradient" else PLAIN
    lines = problems(case, server.find(case, sabotage))
    assert len(lines) == len(FOUND[sabotage])
    assert all(any(expected in line for line in lines) for expected in FOUND[sabotage])


def test_a_case_that_raises(server: Server) -> None:
    with pytest.raises(CaseFailure, match="KeyError: 'no such family'"):
        server.find(replace(PLAIN, family="no such family"))
