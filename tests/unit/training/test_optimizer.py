"""The optimizer: its state in a checkpoint is that of each parameter, and a trained model is freed with it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from torch import Tensor

from exo_megatron.config.sections import ComputeConfig, OptimizerConfig, ParallelConfig
from exo_megatron.execution.policy import Policy
from exo_megatron.models.policy import build_policy
from exo_megatron.parallel.runtime import distributed_runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.training import optimizer as optimizer_module
from exo_megatron.training.gradients import update_weights
from exo_megatron.training.optimizer import make_trainee
from tests.reference.sharded import joined, parts_of
from tests.reference.tiny_spec import TINY_SPEC

BETA1, BETA2 = 0.8, 0.9


@pytest.mark.parametrize("bucket_size", [None, 500])
def test_state_of_every_parameter(bucket_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """After one step from nothing the moments are (1 - beta1) g and (1 - beta2) g^2.

    TINY_SPEC has sizes that are no multiples of 128, to which megatron-core pads its buckets.
    """

    def in_buckets(**settings: Any) -> DistributedDataParallelConfig:
        overlap = {"overlap_grad_reduce": True, "bucket_size": bucket_size} if bucket_size else {}
        return DistributedDataParallelConfig(**settings | overlap)

    monkeypatch.setattr(optimizer_module, "DistributedDataParallelConfig", in_buckets)
    compute = ComputeConfig(precision="fp32")
    adam = OptimizerConfig(lr=0.1, beta1=BETA1, beta2=BETA2, clip_grad=0.0)
    with distributed_runtime() as runtime, model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        torch.manual_seed(0)
        model = build_policy(TINY_SPEC, topology, compute)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        trainee = make_trainee(Policy(model, topology, compute), adam)
        (buffer,) = trainee.model.buffers
        assert (len(buffer.buckets) > 3) == bool(bucket_size)
        for parameter in model.parameters():
            vars(parameter)["main_grad"].normal_()
        update_weights(trainee.optimizer, trainee.clip_grad)
        stored = joined(trainee.sharded_state(loading=False)["optimizer"]["param_state"].values())
        expected: dict[str, Callable[[Tensor], Tensor]] = {
            "": lambda parameter: parameter.detach(),
            "optimizer.state.param.": lambda parameter: parameter.detach(),
            "optimizer.state.exp_avg.": lambda parameter: (1 - BETA1) * vars(parameter)["main_grad"],
            "optimizer.state.exp_avg_sq.": lambda parameter: (1 - BETA2) * vars(parameter)["main_grad"] ** 2,
        }
        for prefix, pick in expected.items():
            for (key, place), part in parts_of(model, pick):
                found = stored[prefix + key][place].view(part.shape)
                torch.testing.assert_close(found, part, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_trained_model_is_freed(precision: Literal["fp32", "bf16"]) -> None:
    """A workflow trains several models in one process: nothing may keep one of them after its stage."""
    compute = ComputeConfig(precision=precision)
    with distributed_runtime() as runtime, model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        model = build_policy(TINY_SPEC, topology, compute)
        trainee = make_trainee(Policy(model, topology, compute), OptimizerConfig())
        sum(parameter.sum() for parameter in model.parameters()).backward()
        assert all(vars(parameter)["main_grad"].count_nonzero() for parameter in model.parameters())
        update_weights(trainee.optimizer, trainee.clip_grad)
        kept = weakref.ref(model), weakref.ref(trainee.optimizer)
        del model, trainee
        gc.collect()
        assert [reference() for reference in kept] == [None, None]
