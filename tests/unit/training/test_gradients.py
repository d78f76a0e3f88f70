"""Norm, clipping and division of gradients (over ranks: test_align_parity), and lengths known in advance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from exo_megatron.config.sections import ComputeConfig, OptimizerConfig, ParallelConfig
from exo_megatron.execution.policy import Policy
from exo_megatron.models.policy import build_policy
from exo_megatron.parallel.runtime import distributed_runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.training.gradients import finalize_gradients, update_weights
from exo_megatron.training.optimizer import Trainee, make_trainee
from exo_megatron.training.schedule import _KnownShapes
from tests.reference.sharded import joined, parts_of
from tests.reference.tiny_spec import TINY_SPEC

BETA1 = 0.9


@contextmanager
def trainee_with_gradients(*, tied: bool = False) -> Iterator[tuple[Trainee, list[Tensor]]]:
    """A trainee and copies of the random gradients in its buffers, of different sizes."""
    compute = ComputeConfig(precision="fp32")
    spec = TINY_SPEC.model_copy(update={"tied_embeddings": tied})
    with distributed_runtime() as runtime, model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        torch.manual_seed(0)
        model = build_policy(spec, topology, compute)
        trainee = make_trainee(Policy(model, topology, compute), OptimizerConfig(beta1=BETA1))
        gradients = []
        for number, parameter in enumerate(model.parameters()):
            torch.nn.init.normal_(parameter)
            gradients.append(vars(parameter)["main_grad"].normal_().mul_(number + 1).clone())
        yield trainee, gradients


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("share", [0.25, 4.0, None])
def test_norm_and_clipping(share: float | None, tied: bool) -> None:
    """The limit is a share of the norm, over which nothing changes. Adam's first moments are (1 - beta1) g."""
    with trainee_with_gradients(tied=tied) as (trainee, gradients):
        expected = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
        found = update_weights(trainee.optimizer, None if share is None else share * expected.item())
        assert found.dtype == torch.float64 and found.item() == pytest.approx(expected.item(), rel=1e-6)
        factor = 1.0 if share is None else min(share, 1.0)
        stored = joined(trainee.sharded_state(loading=False)["optimizer"]["param_state"].values())
        for parameter, gradient in zip(trainee.policy.model.parameters(), gradients, strict=True):
            vars(parameter)["expected"] = (1 - BETA1) * factor * gradient
        for (key, place), part in parts_of(trainee.policy.model, lambda parameter: vars(parameter)["expected"]):
            moment = stored[f"optimizer.state.exp_avg.{key}"][place].view(part.shape)
            torch.testing.assert_close(moment, part, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("units", "divisor"), [(3, 3.0), (0, 1.0)])
def test_division_by_the_number_of_units(units: int, divisor: float) -> None:
    """A step without units leaves gradients as they are, which are 0 then."""
    with trainee_with_gradients() as (trainee, gradients):
        count = torch.tensor(units, dtype=torch.int)
        finalize_gradients([trainee.model], count, topology=trainee.policy.topology)
        for parameter, gradient in zip(trainee.policy.model.parameters(), gradients, strict=True):
            torch.testing.assert_close(vars(parameter)["main_grad"], gradient / divisor)


def test_shapes_come_in_the_order_of_the_micro_batches() -> None:
    with trainee_with_gradients() as (trainee, _):
        known = _KnownShapes(trainee, [5, 7])
        first, second = ([length, 1, TINY_SPEC.hidden_size] for length in (5, 7))
        assert known._communicate_shapes(None, None, True, False) == (first, [0, 0, 0])
        assert known._communicate_shapes(torch.empty(first), None, True, True) == (second, first)
        with pytest.raises(RuntimeError, match=r"sends \[5, 1, 16\], the other one expects \[7, 1, 16\]"):
            known._communicate_shapes(torch.empty(first), None, False, False)
