"""Experts whose activations are computed for all of them at once, against megatron-core's, one after another."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP

from exo_megatron.config.sections import ComputeConfig, ParallelConfig
from exo_megatron.models.experts import LocalExperts
from exo_megatron.models.policy import build_policy
from exo_megatron.models.spec import Experts
from exo_megatron.parallel.runtime import distributed_runtime
from exo_megatron.parallel.topology import model_parallel
from tests.reference.tiny_spec import TINY_SPEC


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("counts", [[3, 0, 4], [7], [0, 5]])
def test_values_and_gradients_are_those_of_megatron(counts: list[int], precision: str) -> None:
    """Bit for bit; an expert may have no token."""
    generator = torch.Generator().manual_seed(0)
    experts = Experts(count=len(counts), per_token=1, ffn_hidden_size=24, normalized=False)
    spec = TINY_SPEC.model_copy(update={"experts": experts})
    with distributed_runtime() as runtime, model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        model = build_policy(spec, topology, ComputeConfig.model_validate({"precision": precision}))
        ours = model.decoder.layers[0].mlp.experts
        assert isinstance(ours, LocalExperts)
        for parameter in ours.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 3)
        dtype = next(ours.parameters()).dtype
        tokens = torch.randn(sum(counts), spec.hidden_size, generator=generator).to(dtype)
        weights = torch.rand(sum(counts), generator=generator)
        gradient = torch.randn(tokens.shape, generator=generator).to(dtype)
        sides = []
        for together in (True, False):
            inputs = [tokens.clone().requires_grad_(), weights.clone().requires_grad_()]
            if together:
                output = ours.together(inputs[0], counts, inputs[1])
            else:
                output, _ = SequentialMLP.forward(ours, inputs[0], torch.tensor(counts), inputs[1])
            assert output.dtype == dtype
            sides.append([output, *torch.autograd.grad(output, [*inputs, *ours.parameters()], gradient)])
        assert all(torch.equal(*pair) for pair in zip(*sides, strict=True))
