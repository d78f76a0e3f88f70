"""A model computes in the precision that it is built in, whatever its parts are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from exo_megatron.config.sections import ComputeConfig, ParallelConfig
from exo_megatron.execution.forward import forward_only, stage_output
from exo_megatron.models.layouts.groups import build_layout
from exo_megatron.models.policy import DTYPES, build_policy
from exo_megatron.parallel.runtime import distributed_runtime
from exo_megatron.parallel.topology import model_parallel
from tests.reference.tiny_spec import TINY_SPEC

LEARNED_POSITIONS = {"rotary": None, "norm": "layer", "gated": False, "activation": "gelu", "linear_bias": True}


@pytest.mark.parametrize("changes", [{}, LEARNED_POSITIONS], ids=["rotary", "learned positions"])
@pytest.mark.parametrize("precision", DTYPES)
def test_all_parameters_and_the_output(precision: Any, changes: dict[str, object]) -> None:
    with distributed_runtime() as runtime, model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        spec = TINY_SPEC.model_copy(update=changes)
        model = build_policy(spec, topology, ComputeConfig(precision=precision))
        assert {parameter.dtype for parameter in model.parameters()} == {DTYPES[precision]}
        for parameter in model.parameters():
            torch.nn.init.ones_(parameter)
        with forward_only(model):
            assert stage_output(model, build_layout([[3, 4]], [[[6, 7], [8]]])).dtype == DTYPES[precision]
