"""Stand-ins for CUDA kernels: against plain formulas, and that megatron-core's layers and optimizer really use them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from exo_megatron.config.sections import ComputeConfig, OptimizerConfig, ParallelConfig
from exo_megatron.execution.forward import pipeline_forward
from exo_megatron.execution.policy import Policy
from exo_megatron.models.experts import LocalExperts
from exo_megatron.models.layouts.groups import build_layout
from exo_megatron.models.policy import build_policy
from exo_megatron.models.spec import Experts, ModelSpec
from exo_megatron.parallel import cpu_backend
from exo_megatron.parallel.runtime import distributed_runtime
from exo_megatron.parallel.topology import Topology, model_parallel
from exo_megatron.training.optimizer import make_trainee
from tests.reference.tiny_spec import TINY_SPEC

EXPERTS = Experts(count=2, per_token=2, ffn_hidden_size=24, normalized=True)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3, 12), (7, 12), (4, 2, 3, 12)])
def test_rms_norm_is_that_of_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Values, and gradients against those of torch's in fp64; rows far from unit size, and one of zeros."""
    hidden, weight, gradient = random(*shape, dtype=dtype) * 30, random(12, dtype=dtype, seed=1), random(*shape, seed=2)
    hidden[0] = 0
    sides: list[list[Tensor]] = []
    for norm, wide in ((cpu_backend.rms_norm, dtype), (lambda x, w, eps: F.rms_norm(x, (12,), w, eps), torch.float64)):
        x, w = (each.to(wide).requires_grad_() for each in (hidden, weight))
        y = norm(x, w, 1e-3)
        assert y.dtype == wide
        sides.append([y, *torch.autograd.grad(y, (x, w), gradient.to(dtype).to(wide))])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for ours, theirs in zip(*sides, strict=True):
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_rms_norm_gradients_by_differences() -> None:
    inputs = (random(5, 2, 6).requires_grad_(), random(6, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(lambda hidden, weight: cpu_backend.rms_norm(hidden, weight, 1e-2), inputs)


class FakeGroup:
    def __init__(self, size: int) -> None:
        self.ranks = size

    def size(self) -> int:
        return self.ranks


@pytest.mark.parametrize(("ranks", "same", "runs"), [(1, True, False), (1, False, True), (2, True, True)])
def test_collective_is_left_out_only_alone_and_in_place(ranks: int, same: bool, runs: bool) -> None:
    calls: list[bool] = []
    collective = cpu_backend.unless_alone(lambda output, input, *, group, async_op: calls.append(async_op))
    buffer = torch.zeros(4)
    collective(buffer if same else torch.zeros(4), buffer, group=FakeGroup(ranks), async_op=True)
    assert calls == [True] * runs


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with distributed_runtime() as runtime, model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        yield topology


@pytest.mark.parametrize(
    "spec",
    [TINY_SPEC, TINY_SPEC.model_copy(update={"experts": EXPERTS})],
    ids=["dense", "experts"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layers_add_to_their_buffers(spec: ModelSpec, precision: Literal["fp32", "bf16"], topology: Topology) -> None:
    """Twice, as two micro-batches do: twice what autograd makes, in bf16 up to the rounding of that."""
    compute = ComputeConfig(precision=precision)
    models = [build_policy(spec, topology, compute) for _ in range(2)]
    for model in models:
        for number, parameter in enumerate(model.parameters()):
            parameter.data.copy_(random(*parameter.shape, seed=number) / 4)
    plain, trained = models
    trainee = make_trainee(Policy(trained, topology, compute), OptimizerConfig())
    for model in (plain, trainee.policy.model, trainee.policy.model):
        layout = build_layout([[3, 4, 5]], [[[6, 7], [8, 9, 10]]])
        output = pipeline_forward(Policy(model, topology, compute), layout)
        assert output is not None
        output.float().square().sum().backward()
    tolerance = {"fp32": 1e-5, "bf16": 2e-2}[precision]
    for expected, parameter in zip(plain.parameters(), trained.parameters(), strict=True):
        if expected.grad is not None:
            added = vars(parameter)["main_grad"] / 2
            torch.testing.assert_close(added, expected.grad.float(), rtol=tolerance, atol=tolerance * added.abs().max())
    linears = [part for part in trained.modules() if isinstance(part, (ColumnParallelLinear, RowParallelLinear))]
    decoder = [part for part in linears if part.weight is not None and vars(part.weight)["grad_added_to_main_grad"]]
    assert len(decoder) >= (4 if spec.experts is None else 2) * spec.layers
    assert all(part.weight.grad is None for part in decoder)
    experts = [part for part in trained.modules() if isinstance(part, LocalExperts)]
    assert len(experts) == (0 if spec.experts is None else spec.layers)
    for part in experts:
        assert all(vars(weight)["grad_added_to_main_grad"] and weight.grad is None for weight in (part.fc1, part.fc2))
