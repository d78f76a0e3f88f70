"""Passes without gradients give the bits of those with gradients, whatever layers the model has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from torch import Tensor
from torch.autograd.function import Function

from exo_megatron.config.sections import ComputeConfig, ParallelConfig
from exo_megatron.execution.forward import forward_only, stage_output
from exo_megatron.models.layers import plain_residual
from exo_megatron.models.layouts.groups import build_layout
from exo_megatron.models.policy import PolicyModel, build_policy
from exo_megatron.models.spec import Experts
from exo_megatron.parallel.runtime import distributed_runtime
from exo_megatron.parallel.topology import Topology, model_parallel
from tests.reference.tiny_spec import TINY_SPEC

FAMILIES = {
    "llama": {},
    "qwen": {"qkv_bias": True, "qk_norm": True},
    "gemma": {"post_norms": True, "zero_centered_norm": True, "activation": "gelu_tanh", "attention_softcap": 20.0},
    "gpt2": {"rotary": None, "norm": "layer", "gated": False, "activation": "gelu", "linear_bias": True},
    "phi": {"parallel_residual": True, "norm": "layer", "gated": False, "activation": "gelu", "linear_bias": True},
    "mixtral": {"experts": Experts(count=3, per_token=2, ffn_hidden_size=24, normalized=True)},
}


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with distributed_runtime() as runtime, model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        yield topology


def filled_model(topology: Topology, **changes: object) -> PolicyModel:
    model = build_policy(TINY_SPEC.model_copy(update=changes), topology, ComputeConfig(precision="fp32"))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model


def output(model: PolicyModel) -> Tensor:
    return stage_output(model, build_layout([[3, 4, 5], [6]], [[[6, 7], [8, 9, 10]], [[1, 2]]]))


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_same_bits_without_gradients(changes: dict[str, object], topology: Topology) -> None:
    model = filled_model(topology, **changes)
    with_gradients = output(model)
    assert with_gradients.requires_grad
    with forward_only(model):
        assert torch.equal(output(model), with_gradients)
    with torch.no_grad():  # as the first forward of a recomputed layer
        assert torch.equal(output(model), with_gradients)


def test_layers_run_no_function_of_autograd_without_gradients(
    topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs the host as much as a small kernel. The embedding and the output still have a few."""
    ran: list[str] = []
    original = Function.apply.__func__

    def counted(function: type[Function], *inputs: object) -> object:
        ran.append(function.__name__)
        return original(function, *inputs)

    models = [filled_model(topology, layers=layers) for layers in (1, 3)]
    monkeypatch.setattr(Function, "apply", classmethod(counted))
    counts = []
    for model in models:
        ran.clear()
        with forward_only(model):
            output(model)
        counts.append(sorted(ran))
    # Attention of whole groups is one; that of generation is none.
    assert counts[1] == sorted([*counts[0], "_Attention", "_Attention"])


@pytest.mark.parametrize("biased", [True, False])
def test_residual_connection_is_that_of_megatron(biased: bool) -> None:
    output, residual, bias = torch.randn(3, 2, 1, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    given = (output, bias if biased else None)
    expected = get_bias_dropout_add(training=True, fused=False)(given, residual, 0.0)
    assert torch.equal(plain_residual(True, False)(given, residual, 0.0), expected)


def test_layers_of_equal_frequencies_share_their_turns(topology: Topology) -> None:
    model = filled_model(topology, layers=4, windows=(2, None, 2, None))
    tables = [layer.self_attention.core_attention.table for layer in model.decoder.layers]
    assert tables[0] is tables[2] and tables[1] is tables[3] and tables[0] is not tables[1]
