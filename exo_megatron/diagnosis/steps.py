"""Checks of whole EXO steps against plain torch on the CPU in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exo_megatron.config.sections import OptimizerConfig, ParallelConfig
from exo_megatron.diagnosis.checks import Figure, Outcome, judge
from exo_megatron.diagnosis.plain import FirstAdam, PlainStep, Tensors, plain_step
from exo_megatron.diagnosis.site import BF16_FACTOR, FP32_LIMIT, Precision, Site, largest_error, load_small
from exo_megatron.diagnosis.small_models import EXO, SmallModel
from exo_megatron.diagnosis.whole import complete_gradients, gather_tensors
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.training.objectives import AlignObjective
from exo_megatron.training.optimizer import make_trainee
from exo_megatron.training.step import forward_gradients, plan_step, train_step

ADAM = OptimizerConfig(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-3, clip_grad=0.5, weight_decay=0.0)
"""eps is of the size of gradients, so that the change of a weight depends smoothly on its gradient."""


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
    return _compare(model, precision, result.loss, gradients, result.grad_norm, weights)


@dataclass(frozen=True)
class _Errors:
    """Relative errors of a step's loss, gradients, their norm, and the changes of its weights."""

    loss: float
    gradients: float
    grad_norm: float
    changes: float


def _compare(
    model: SmallModel, precision: Precision, loss: float, gradients: Tensors, grad_norm: float, weights: Tensors
) -> Outcome:
    exact = _plain_step(model, torch.float64)
    ours = _errors(model, exact, loss, gradients, grad_norm, weights)
    limits = _Errors(FP32_LIMIT, FP32_LIMIT, FP32_LIMIT, FP32_LIMIT)
    if precision == "bf16":
        rough = _plain_step(model, torch.bfloat16)
        plain = _errors(model, exact, float(rough.losses.mean()), rough.gradients, rough.grad_norm, rough.weights)
        # A mean and a norm may come out right by chance: their limits are those of their parts.
        of_groups = float((rough.losses - exact.losses).abs().max() / exact.losses.mean())
        worst = (of_groups, plain.gradients, plain.gradients, plain.changes)
        limits = _Errors(*(BF16_FACTOR * error for error in worst))
    names = {"loss": "loss", "gradients": "gradients", "grad_norm": "norm", "changes": "weights"}
    return judge([Figure(shown, vars(ours)[name], vars(limits)[name]) for name, shown in names.items()])


def _errors(
    model: SmallModel, exact: PlainStep, loss: float, gradients: Tensors, grad_norm: float, weights: Tensors
) -> _Errors:
    wanted = float(exact.losses.mean())
    return _Errors(
        abs(loss - wanted) / wanted,
        largest_error(gradients, exact.gradients),
        abs(grad_norm - exact.grad_norm) / exact.grad_norm,
        largest_error(_changes(model, weights), _changes(model, exact.weights)),
    )


def _changes(model: SmallModel, weights: Tensors) -> Tensors:
    return {name: weight.double() - model.tensors[name].double() for name, weight in weights.items()}


def _plain_step(model: SmallModel, dtype: torch.dtype) -> PlainStep:
    return plain_step(model.plain(dtype), model.groups, EXO, FirstAdam(ADAM.lr, ADAM.eps, ADAM.clip_grad))
