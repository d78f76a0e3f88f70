"""Gradients of weights in megatron-core's buffers, against fp64 sums of what went into and came out of each layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from exo_megatron.config.sections import ComputeConfig, LossConfig, OptimizerConfig, ParallelConfig
from exo_megatron.data.groups import Group
from exo_megatron.execution.policy import Policy
from exo_megatron.models import main_grad
from exo_megatron.models.main_grad import WeightGradients, add_gradients_in_place, look_up
from exo_megatron.models.policy import PolicyModel, build_policy
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.runtime import distributed_runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.training.objectives import AlignObjective
from exo_megatron.training.optimizer import make_trainee
from exo_megatron.training.step import forward_gradients, plan_step
from tests.reference.tiny_spec import TINY_SPEC

LEARNED = TINY_SPEC.model_copy(update={"rotary": None, "tied_embeddings": True})
ROUNDING = 2e-6  # fp32, of sums over a few micro-batches; bf16 would be 4e-3


class Products:
    """The fp64 sums of gradient^T input of every linear, and of the rows of every embedding, of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.sums: dict[Tensor, Tensor] = {}
        for module in model.modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear, nn.Embedding)) or hasattr(
                module, "num_embeddings_per_partition"
            ):
                module.register_forward_hook(self._watch)

    def _watch(self, module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        given, made = inputs[0].detach(), output[0] if isinstance(output, tuple) else output

        def add(gradient: Tensor) -> None:
            total = self.sums.setdefault(module.weight, torch.zeros(module.weight.shape, dtype=torch.float64))
            rows = gradient.reshape(-1, gradient.shape[-1]).double()
            if given.dtype == torch.int64:
                total.index_add_(0, given.reshape(-1), rows)
            else:
                total.addmm_(rows.t(), given.reshape(-1, given.shape[-1]).double())

        if made.requires_grad:
            made.register_hook(add)


def groups() -> list[Group]:
    """Of different lengths, so that a step needs several micro-batches; token 3 occurs often."""
    return [
        Group(
            str(number),
            (3, 5, 2 + number, 3),
            ((3, 4, 3, 7 + number), (9, 3)),
            rewards=(1.0, 0.0),
            reference_logprobs=(-9.0, -5.0),
        )
        for number in range(6)
    ]


@pytest.mark.parametrize("spec", [TINY_SPEC, LEARNED], ids=["rotary", "tied_learned"])
def test_every_weight_is_as_exact_as_fp32(spec: ModelSpec) -> None:
    """Linears, words and positions of a model in bf16. A tied matrix has the output layer's gradient, too."""
    compute = ComputeConfig(precision="bf16", max_tokens_per_microbatch=12)
    with distributed_runtime() as runtime, model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        torch.manual_seed(0)
        model = build_policy(spec, topology, compute)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        trainee = make_trainee(Policy(model, topology, compute), OptimizerConfig())
        products = Products(model)
        objective = AlignObjective.of(LossConfig())
        batches = plan_step(trainee, groups(), objective).microbatches
        assert len(batches) == 6
        forward_gradients(trainee, batches, objective)
        checked = compare(model, products, spec)
    assert checked == 4 * spec.layers + 1  # words; positions where words are tied


def compare(model: PolicyModel, products: Products, spec: ModelSpec) -> int:
    tied = model.output_weight() if spec.tied_embeddings else None
    checked = 0
    for weight, total in products.sums.items():
        if weight is not tied:
            found, expected = vars(weight)["main_grad"].double(), total / len(groups())
            assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()
            rounded = expected.bfloat16().double()
            assert (rounded - expected).abs().max() > 100 * ROUNDING * expected.abs().max()
            checked += 1
    return checked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_added_in_fp32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of two rows. Ids repeat; rows of zeros change nothing, wherever they go."""
    monkeypatch.setattr(main_grad, "LARGEST_TEMPORARY", 2 * 4 * 4)
    weight = nn.Parameter(torch.randn(5, 4).to(dtype))
    weight.main_grad = torch.full((5, 4), 2.0)
    weight.grad_added_to_main_grad = False
    ids = torch.tensor([[0, 3, 3, 0, 0, 1, 3]])
    gradient = torch.randn(1, 7, 4).to(dtype)
    gradient[0, 3:5] = 0.0
    output = look_up(ids, weight)
    assert torch.equal(output, weight[ids])
    output.backward(gradient)
    expected = torch.full((5, 4), 2.0, dtype=torch.float64).index_add_(0, ids[0], gradient[0].double())
    torch.testing.assert_close(weight.main_grad.double(), expected, rtol=1e-6, atol=1e-6)
    assert weight.grad is None and weight.grad_added_to_main_grad


def test_lookup_without_a_buffer() -> None:
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 3, 3])
    assert torch.autograd.gradcheck(lambda w: look_up(ids, w), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_of_a_linear(dtype: torch.dtype) -> None:
    rows, gradient, total = torch.randn(64, 6).to(dtype), torch.randn(64, 4).to(dtype), torch.full((4, 6), 2.0)
    WeightGradients.wgrad_gemm_accum_fp32(rows, gradient, total)
    expected = 2.0 + gradient.double().t() @ rows.double()
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-5)


def test_weight_gradient_of_no_rows() -> None:
    """An expert without tokens."""
    total = torch.full((4, 6), 2.0)
    WeightGradients.wgrad_gemm_accum_fp32(torch.empty(0, 6), torch.empty(0, 4), total)
    assert torch.equal(total, torch.full((4, 6), 2.0))


def test_linears_of_transformer_engine_are_asked_to_add() -> None:
    """They have this attribute, which megatron-core sets from gradient_accumulation_fusion."""
    linear = nn.Module()
    linear.fuse_wgrad_accumulation = False
    add_gradients_in_place(nn.Sequential(linear, nn.Linear(2, 2)))
    assert linear.fuse_wgrad_accumulation
