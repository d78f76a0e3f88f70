"""Every check of `doctor --gpu` fails when what it checks is wrong. (test_command.py: it passes when it is right.)"""

from __future__ import annotations

import dataclasses

import pytest

from exo_megatron.checkpoint import load
from exo_megatron.diagnosis.checklist import PRECISIONS
from exo_megatron.logprobs import vocab_parallel
from exo_megatron.logprobs.weight_gradient import WeightGradient
from exo_megatron.models.attention import kernels
from exo_megatron.models.attention.dense import CpuFlashKernel
from exo_megatron.models.attention.passes import Attended
from exo_megatron.models.experts import Router
from exo_megatron.parallel import cpu_backend
from exo_megatron.rollout import native
from exo_megatron.training import step, trainer
from exo_megatron.training.optimizer import Trainee


def transposed_lse(patch):
    merge = kernels.merge_

    def wrong(merged, other):
        merge(merged, Attended(other.output, other.lse.transpose(-1, -2).reshape(other.lse.shape)))

    patch.setattr(kernels, "merge_", wrong)


def wrong_gradient_of_keys(patch):
    right = CpuFlashKernel.backward

    def backward(self, *arguments):
        found = right(self, *arguments)
        return found._replace(key=found.key * 1.03)

    patch.setattr(CpuFlashKernel, "backward", backward)


def wrong_logprob(patch):
    logprobs = vocab_parallel.Softmax.logprobs
    patch.setattr(vocab_parallel.Softmax, "logprobs", lambda *arguments: logprobs(*arguments) + 1e-3)


def no_onehot_in_the_gradient(patch):
    patch.setattr(vocab_parallel._Factors, "subtract_onehot_", lambda *arguments: None)


def wrong_gradient_of_the_output_weight(patch):
    add = WeightGradient.add

    def wrong(self, ids, left, right, *, first):
        add(self, ids, left * 1.2, right, first=first)

    patch.setattr(WeightGradient, "add", wrong)


def one_wrong_weight(patch):
    load_module = load.load_module

    def wrong(model, state, where):
        load_module(model, state, where)
        weight = model.decoder.layers[1].mlp.linear_fc2.weight.detach()
        weight[3, 5] = -weight[3, 5]

    patch.setattr(load, "load_module", wrong)


def wrong_loss(patch):
    _change_result(patch, "loss", 1.05)


def wrong_norm(patch):
    _change_result(patch, "grad_norm", 1.05)


def _change_result(patch, name, factor):
    reduce = step._reduce

    def wrong(*arguments):
        result = reduce(*arguments)
        return dataclasses.replace(result, **{name: factor * vars(result)[name]})

    patch.setattr(step, "_reduce", wrong)


def wrong_gradient_of_norms(patch):
    right = cpu_backend._RMSNorm.backward

    def backward(ctx, output):
        hidden, weight, nothing = right(ctx, output)
        return hidden, 1.1 * weight, nothing

    patch.setattr(cpu_backend._RMSNorm, "backward", staticmethod(backward))


def wrong_learning_rate(patch):
    right = Trainee.set_learning_rate
    patch.setattr(Trainee, "set_learning_rate", lambda self, lr: right(self, 1.2 * lr))


def wrong_router(patch):
    route = Router.forward

    def wrong(self, hidden):
        weights, experts = route(self, hidden)
        return weights, experts.roll(1, -1)

    patch.setattr(Router, "forward", wrong)


def shifted_positions(patch):
    build = native.build_decode_layout

    def wrong(*arguments, **named):
        layout = build(*arguments, **named)
        if layout.active is not None:
            layout.position_ids[: layout.active.count] += 1
        return layout

    patch.setattr(native, "build_decode_layout", wrong)


def lost_moments(patch):
    _change_after_loading(patch, lambda state: state["exp_avg"].zero_())


def wrong_number_of_steps(patch):
    _change_after_loading(patch, lambda state: state["step"].add_(1))


def _change_after_loading(patch, change):
    right = Trainee.load_state

    def wrong(self, state):
        right(self, state)
        for part in self.optimizer.chained_optimizers:
            for state_of_parameter in part.optimizer.state.values():
                change(state_of_parameter)

    patch.setattr(Trainee, "load_state", wrong)


def another_order_after_resume(patch):
    right, calls = trainer.StepSampler.indices, []

    def wrong(self, number):
        calls.append(number)
        return right(self, 0 if calls.count(1) == 2 else number)

    patch.setattr(trainer.StepSampler, "indices", wrong)


def weights_not_loaded(patch):
    patch.setattr(Trainee, "load_state", lambda self, state: None)


SABOTAGE = {
    "attention in {}": (transposed_lse, wrong_gradient_of_keys),
    "log-probs in bf16": (wrong_logprob, no_onehot_in_the_gradient, wrong_gradient_of_the_output_weight),
    "checkpoint made on the CPU in {}": (one_wrong_weight,),
    "step in {}": (wrong_gradient_of_norms, wrong_loss, wrong_norm, wrong_learning_rate, transposed_lse),
    "step of a mixture of experts in {}": (wrong_router,),
    "greedy decoding in {}": (shifted_positions,),
    "save and resume in {}": (lost_moments, wrong_number_of_steps, another_order_after_resume, weights_not_loaded),
}
CASES = [
    (name.format(precision), sabotage)
    for name, sabotages in SABOTAGE.items()
    for number, sabotage in enumerate(sabotages)
    for precision in (PRECISIONS if "{}" in name and number == 0 else ("fp32",))  # once for every check, at least
]


@pytest.mark.parametrize(("name", "sabotage"), CASES, ids=[f"{name}-{s.__name__}" for name, s in CASES])
def test_a_check_fails_when_what_it_checks_is_wrong(correctness, monkeypatch, name, sabotage):
    sabotage(monkeypatch)
    outcome = correctness[name].run()
    assert outcome.verdict == "failed", outcome
