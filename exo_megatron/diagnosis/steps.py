"""Checks of whole EXO steps against plain torch on the CPU in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exo_megatron.config.sections import OptimizerConfig, ParallelConfig
from exo_megatron.diagnosis.checks import Figure, Outcome, judge
from exo_megatron.diagnosis.plain import FirstAdam, NamedTensors, PlainStep, plain_step
from exo_megatron.diagnosis.site import BF16_FACTOR, FP32_LIMIT, Precision, Site, errors_by_name, load_small
from exo_megatron.diagnosis.small_models import EXO, SmallModel
from exo_megatron.diagnosis.whole import complete_gradients, gather_tensors
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.training.objectives import AlignObjective
from exo_megatron.training.optimizer import make_trainee
from exo_megatron.training.step import forward_gradients, plan_step, train_step

ADAM = OptimizerConfig(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-3, clip_grad=0.5, weight_decay=0.0)
"""eps is of the size of gradients, so that the change of a weight depends smoothly on its gradient."""
MIXTURE_LIMIT = 0.15
"""Largest relative error of a mixture of experts in bf16, see `_judge_mixture`."""


@dataclass(frozen=True)
class _Step:
    """The results of a step: loss, gradients and their norm, weights after it, by HF name."""

    loss: float
    gradients: NamedTensors
    grad_norm: float
    weights: NamedTensors


def check_step(site: Site, model: SmallModel, parallel: ParallelConfig, precision: Precision) -> Outcome | None:
    """Compare loss, gradients, their norm, and the change of the weights.

    The step has several micro-batches and a group that exceeds one. Collective over the world.
    """
    objective = AlignObjective.of(EXO)
    with model_parallel(site.runtime, parallel, seed=0) as topology:
        trainee = make_trainee(load_small(model, topology, precision), ADAM)
        batches = plan_step(trainee, model.groups, objective)
        forward_gradients(trainee, batches.microbatches, objective, batches.oversized)
        found = complete_gradients(trainee)
        gradients = gather_tensors(trainee.policy.model, model.rules, site.runtime, found)
        trainee = make_trainee(load_small(model, topology, precision), ADAM)
        batches = plan_step(trainee, model.groups, objective)
        result = train_step(
            trainee, batches.microbatches, objective, oversized=batches.oversized, learning_rate=ADAM.lr
        )
        weights = gather_tensors(trainee.policy.model, model.rules, site.runtime)
    if gradients is None or weights is None:
        return None
    return _compare(model, precision, _Step(result.loss, gradients, result.grad_norm, weights))


@dataclass(frozen=True)
class _Errors:
    """Relative errors of a step: of its loss, of its gradients' norm, and of every tensor.

    Attributes:
        loss, grad_norm: numbers.
        gradients, changes: [tensors], of the gradients and of the changes of the weights.
    """

    loss: float
    grad_norm: float
    gradients: Tensor
    changes: Tensor


def _compare(model: SmallModel, precision: Precision, ours: _Step) -> Outcome:
    exact = _plain_step(model, torch.float64)
    errors = _errors(model, exact, ours)
    if precision == "bf16" and model.spec.experts is not None:
        return _judge_mixture(errors.loss, errors.grad_norm, errors.gradients, errors.changes)
    found = (errors.loss, float(errors.gradients.max()), errors.grad_norm, float(errors.changes.max()))
    limits: tuple[float, ...] = (FP32_LIMIT,) * len(found)
    if precision == "bf16":
        rough = _plain_step(model, torch.bfloat16)
        plain = _errors(model, exact, _Step(0.0, rough.gradients, 0.0, rough.weights))
        # A mean and a norm may come out right by chance: their limits are those of their parts.
        of_groups = float((rough.losses - exact.losses).abs().max() / exact.losses.mean())
        of_gradients = float(plain.gradients.max())
        limits = (of_groups, of_gradients, of_gradients, float(plain.changes.max()))
        limits = tuple(BF16_FACTOR * limit for limit in limits)
    names = ("loss", "gradients", "norm", "weights")
    return judge([Figure(*each) for each in zip(names, found, limits, strict=True)])


def _judge_mixture(loss: float, grad_norm: float, gradients: Tensor, changes: Tensor) -> Outcome:
    """Compare relative errors of a mixture of experts in bf16 with their limit.

    Where two experts are about equally probable, rounding decides, and the token's share of the
    gradients of few tensors is another one: the median tensor counts.
    """
    figures = {
        "loss": loss,
        "norm": grad_norm,
        "median gradient": float(gradients.median()),
        "weights": float(changes.median()),
    }
    return judge([Figure(name, seen, MIXTURE_LIMIT) for name, seen in figures.items()])


def _errors(model: SmallModel, exact: PlainStep, ours: _Step) -> _Errors:
    wanted = float(exact.losses.mean())
    return _Errors(
        abs(ours.loss - wanted) / wanted,
        abs(ours.grad_norm - exact.grad_norm) / exact.grad_norm,
        errors_by_name(ours.gradients, exact.gradients),
        errors_by_name(_changes(model, ours.weights), _changes(model, exact.weights)),
    )


def _changes(model: SmallModel, weights: NamedTensors) -> NamedTensors:
    return {name: weight.double() - model.tensors[name].double() for name, weight in weights.items()}


def _plain_step(model: SmallModel, dtype: torch.dtype) -> PlainStep:
    return plain_step(model.plain(dtype), model.groups, EXO, FirstAdam(ADAM.lr, ADAM.eps, ADAM.clip_grad))
