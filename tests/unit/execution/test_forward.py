"""A pass without gradients keeps no graph, whatever the layers are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exo_megatron.config.sections import ComputeConfig, ParallelConfig
from exo_megatron.execution.forward import forward_only, pipeline_forward
from exo_megatron.execution.policy import Policy
from exo_megatron.models.layouts.groups import build_layout
from exo_megatron.models.policy import build_policy
from exo_megatron.models.spec import Experts
from exo_megatron.parallel.runtime import distributed_runtime
from exo_megatron.parallel.topology import Topology, model_parallel
from tests.reference.tiny_spec import TINY_SPEC


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with distributed_runtime() as runtime, model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        yield topology


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "post_norms": True,
            "qk_norm": True,
            "zero_centered_norm": True,
            "attention_softcap": 2.0,
            "windows": (2, None),
        },
        {"norm": "layer", "rotary": None, "gated": False, "activation": "gelu", "qkv_bias": True, "linear_bias": True},
        {"norm": "layer", "parallel_residual": True, "qkv_bias": True, "linear_bias": True},
        {"experts": Experts(count=4, per_token=2, ffn_hidden_size=24, normalized=True)},
    ],
)
def test_no_graph_is_kept(changes: dict[str, Any], topology: Topology) -> None:
    """megatron-core turns gradients on inside its layers, around residual connections."""
    compute = ComputeConfig(precision="fp32")
    model = build_policy(TINY_SPEC.model_copy(update=changes), topology, compute)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    seen: list[bool] = []

    def look(module: nn.Module, arguments: Any, output: tuple[Tensor, Any]) -> None:
        seen.append(output[0].requires_grad)

    for layer in model.decoder.layers:
        layer.register_forward_hook(look)
    layout = build_layout([[3, 4, 5]], [[[6, 7], [8, 9, 10]]])
    with forward_only(model):
        output = pipeline_forward(Policy(model, topology, compute), layout)
    assert output is not None and output.isfinite().all()
    assert seen == [False, False] and not output.requires_grad
