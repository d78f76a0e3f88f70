"""Experts with one weight for all of them, against megatron-core's, each a module of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from exo_megatron.config.sections import ComputeConfig, ParallelConfig
from exo_megatron.models import experts as experts_module
from exo_megatron.models.expert_exchange import ExpertShare
from exo_megatron.models.experts import LocalExperts
from exo_megatron.models.layers import backend
from exo_megatron.models.policy import DTYPES, build_policy, transformer_config
from exo_megatron.models.spec import Experts
from exo_megatron.parallel.runtime import distributed_runtime
from exo_megatron.parallel.topology import model_parallel
from tests.reference.tiny_spec import TINY_SPEC


@contextmanager
def both(count: int, precision: str) -> Iterator[tuple[LocalExperts, SequentialMLP]]:
    """Ours and megatron-core's, with the same weights."""
    generator = torch.Generator().manual_seed(0)
    experts = Experts(count=count, per_token=1, ffn_hidden_size=24, normalized=False)
    spec = TINY_SPEC.model_copy(update={"experts": experts})
    compute = ComputeConfig.model_validate({"precision": precision})
    with distributed_runtime() as runtime, model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        ours = build_policy(spec, topology, compute).decoder.layers[0].mlp.experts
        config = transformer_config(spec, topology, compute)
        parts = backend(spec, DTYPES[precision])
        block = MLPSubmodules(linear_fc1=parts.column, activation_func=parts.activation, linear_fc2=parts.row)
        groups = ProcessGroupCollection(
            ep=parallel_state.get_expert_model_parallel_group(),
            expt_tp=parallel_state.get_expert_tensor_parallel_group(),
            expt_dp=parallel_state.get_expert_data_parallel_group(),
        )
        theirs = SequentialMLP(count, config, block, pg_collection=groups)
        for parameter in ours.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 3)
        for number, expert in enumerate(theirs.local_experts):
            expert.linear_fc1.weight.data.copy_(ours.fc1[number])
            expert.linear_fc2.weight.data.copy_(ours.fc2[number])
        yield ours, theirs


def _share(counts: list[int], weights: Tensor) -> ExpertShare:
    return ExpertShare(counts, torch.tensor(counts).cumsum(0).to(torch.int32), weights)


def _inputs(counts: list[int], hidden_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(sum(counts), hidden_size, generator=generator).to(dtype)
    weights = torch.rand(sum(counts), generator=generator)
    return tokens, weights, torch.randn(tokens.shape, generator=generator).to(dtype)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("counts", [[3, 0, 4], [7], [0, 5]])
def test_values_and_gradients_are_those_of_megatron(counts: list[int], precision: str) -> None:
    """Bit for bit; an expert may have no token."""
    with both(len(counts), precision) as (ours, theirs):
        tokens, weights, gradient = _inputs(counts, TINY_SPEC.hidden_size, DTYPES[precision])
        inputs = [tokens.requires_grad_(), weights.requires_grad_()]
        output = ours(tokens, _share(counts, weights))
        assert output.dtype == DTYPES[precision]
        found = [output, *torch.autograd.grad(output, [*inputs, ours.fc1, ours.fc2], gradient)]
        linears = [
            getattr(expert, name).weight for name in ("linear_fc1", "linear_fc2") for expert in theirs.local_experts
        ]
        expected, _ = theirs(tokens, torch.tensor(counts), weights)
        grads = list(torch.autograd.grad(expected, [*inputs, *linears], gradient))
        stacked = [torch.stack(grads[2 : 2 + len(counts)]), torch.stack(grads[2 + len(counts) :])]
        assert all(torch.equal(*pair) for pair in zip(found, [expected, *grads[:2], *stacked], strict=True))


def test_checkpoints_are_those_of_megatron() -> None:
    """The same keys, shapes and places, and what is put together from them is the weight."""
    layers = ((0, 1, 2),)  # the second of two layers
    with both(3, "fp32") as (ours, theirs):
        found, expected = (_stored(each.sharded_state_dict("mlp.experts.", layers)) for each in (ours, theirs))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[place], expected[place]) for place in expected)
        for name, factory in ours.sharded_state_dict().items():
            assert torch.equal(factory.merge_fn([each.data for each in factory.build()]), getattr(ours, name))


def _stored(state: dict[str, Any]) -> dict[tuple[Any, ...], Tensor]:
    stored = {}
    for value in nested_values(state):
        for shard in nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]:
            if isinstance(shard, ShardedTensor):
                place = (shard.key, shard.global_shape, shard.global_offset, shard.axis_fragmentations)
                stored[(*place, shard.replica_id, shard.prepend_axis_num)] = shard.data
    return stored


def test_grouped_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator of the GPU, which the CPU has as a loop: the same values and gradients of the tokens."""
    counts = [3, 0, 4]
    with both(3, "bf16") as (ours, _):
        tokens, weights, gradient = _inputs(counts, TINY_SPEC.hidden_size, torch.bfloat16)
        tokens.requires_grad_()
        sides = []
        for grouped in (False, True):
            calls = []
            operator = torch._grouped_mm

            def counted(*args: Any, _calls: list[Any] = calls, _operator: Any = operator, **kwargs: Any) -> Tensor:
                _calls.append(args)
                result: Tensor = _operator(*args, **kwargs)
                return result

            with monkeypatch.context() as patch:
                patch.setattr(experts_module, "_has_grouped_kernel", lambda *_, _grouped=grouped: _grouped)
                patch.setattr(torch, "_grouped_mm", counted)
                output = ours(tokens, _share(counts, weights))
                sides.append([output, *torch.autograd.grad(output, [tokens, ours.fc1], gradient)])
            assert len(calls) == (4 if grouped else 0)
        for looped, found in zip(*sides, strict=True):
            torch.testing.assert_close(found, looped, rtol=2e-2, atol=2e-2)
