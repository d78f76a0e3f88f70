"""The tests of this folder fail when the project waits, computes or communicates as it should not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.fake_cuda.cases import PLAIN
from tests.fake_cuda.judge import problems
from tests.fake_cuda.server import CaseFailure, Server

FOUND = {
    "cpu_tensor_in_a_collective": "collective: all_reduce on cpu at",
    "strided_tensor_in_a_collective": "collective: all_reduce not contiguous at",
    "item_in_the_loss": "1 more waits for the device, gradients: item at",
    "item_in_the_backward": "1 more waits for the device, gradients: item at",
    "copy_in_every_layer": "operators per layer instead of",
    "number_from_the_host": "copies to the device instead of",
}


@pytest.mark.parametrize("sabotage", FOUND)
def test_found(sabotage: str, server: Server) -> None:
    (line,) = problems(PLAIN, server.find(PLAIN, sabotage))
    assert FOUND[sabotage] in line


def test_a_case_that_raises(server: Server) -> None:
    with pytest.raises(CaseFailure, match="KeyError: 'no such family'"):
        server.find(replace(PLAIN, family="no such family"))
