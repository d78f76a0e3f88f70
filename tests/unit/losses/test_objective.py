"""Values of the objectives worked by hand, their gradients, and the identities between them.

All by-hand values use beta_pi = 0.5, beta_r = 2, so that s_k and r_k / beta_r are logarithms of simple fractions.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from exo_megatron.config.losses import LOSSES
from exo_megatron.config.sections import LossConfig
from exo_megatron.losses.objective import group_objective, statistic_names

KINDS = list(LOSSES)
LN = math.log


def config(kind: str, **changes: Any) -> LossConfig:
    settings: dict[str, Any] = {"kind": kind, "beta_pi": 0.5, "beta_r": 2.0, "label_smoothing": 0.1}
    return LossConfig(**(settings | changes))


def f64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def losses(kind: str, s: Tensor, r: Tensor | None, sizes: list[int], **changes: Any) -> Tensor:
    """Losses of groups whose scaled log-ratios are s [C] and scaled rewards r [C]; the reference is at -20."""
    loss = config(kind, **changes)
    reference = torch.full_like(s, -20.0)
    rewards = None if r is None else r * loss.beta_r
    return group_objective(reference + s / loss.beta_pi, reference, rewards, sizes, loss).losses


# Group A, K = 2: p_theta = (3/4, 1/4), p_r = (1/2, 1/2). Group B, K = 3: p_theta = (1/6, 1/3, 1/2),
# p_r = (1/2, 1/4, 1/4). s and r are given up to a constant of the group, which softmax removes.
S = f64([LN(3.0), 0.0, 0.0, LN(2.0), LN(3.0)])
R = f64([5.0, 5.0, LN(2.0), 0.0, 0.0])
SIZES = [2, 3]


def test_exo_rw_by_hand() -> None:
    # A: 3/4 ln(3/2) + 1/4 ln(1/2) = 3/4 ln 3 - ln 2
    # B: 1/6 ln(1/3) + 1/3 ln(4/3) + 1/2 ln 2
    expected = f64([0.75 * LN(3) - LN(2), -LN(3) / 6 + LN(4 / 3) / 3 + LN(2) / 2])
    torch.testing.assert_close(losses("exo_rw", S, R, SIZES), expected, rtol=1e-13, atol=1e-14)


def test_dpo_rw_by_hand() -> None:
    # A: -1/2 ln(3/4) - 1/2 ln(1/4) = 2 ln 2 - 1/2 ln 3
    # B: -1/2 ln(1/6) - 1/4 ln(1/3) - 1/4 ln(1/2) = 1/2 ln 6 + 1/4 ln 6 = 3/4 ln 6
    expected = f64([2 * LN(2) - 0.5 * LN(3), 0.75 * LN(6)])
    torch.testing.assert_close(losses("dpo_rw", S, R, SIZES), expected, rtol=1e-13, atol=1e-14)


def test_preference_losses_by_hand() -> None:
    # s_w - s_l = ln 3: sigmoid is 3/4.
    # dpo_pref: -ln(3/4).  exo_pref, epsilon = 1/10: 3/4 ln((3/4)/(9/10)) + 1/4 ln((1/4)/(1/10))
    #   = 3/4 ln(5/6) + 1/4 ln(5/2)
    s = f64([LN(3.0), 0.0])
    torch.testing.assert_close(losses("dpo_pref", s, None, [2]), f64([-LN(0.75)]), rtol=1e-13, atol=1e-14)
    expected = f64([0.75 * LN(5 / 6) + 0.25 * LN(5 / 2)])
    torch.testing.assert_close(losses("exo_pref", s, None, [2]), expected, rtol=1e-13, atol=1e-14)


def test_ipo_pref_by_hand() -> None:
    """(h - 1 / (2 beta_pi))^2 of log-ratios, h = (s_w - s_l) / beta_pi = 2 ln 3; its derivative in h is 2 (h - 1)."""
    s = f64([LN(3.0), 0.0, 0.0, LN(3.0)]).requires_grad_()
    found = losses("ipo_pref", s, None, [2, 2])
    torch.testing.assert_close(found, f64([(2 * LN(3) - 1) ** 2, (2 * LN(3) + 1) ** 2]), rtol=1e-13, atol=1e-14)
    (gradient,) = torch.autograd.grad(found.sum(), s)
    chosen, rejected = 4 * (2 * LN(3) - 1), 4 * (-2 * LN(3) - 1)
    torch.testing.assert_close(gradient, f64([chosen, -chosen, rejected, -rejected]), rtol=1e-13, atol=1e-14)


def test_nll_weight_is_added_to_every_group() -> None:
    """loss + lambda * nll, with its gradient; the statistic is the sum of nll without lambda."""
    best_nll = f64([0.25, 3.0]).requires_grad_()
    reference = torch.full_like(S, -20.0)
    plain = config("exo_rw")
    weighted = config("exo_rw", nll_weight=0.5)
    rewards = R * plain.beta_r
    alone = group_objective(reference + S / 0.5, reference, rewards, SIZES, plain)
    found = group_objective(reference + S / 0.5, reference, rewards, SIZES, weighted, best_nll=best_nll)
    torch.testing.assert_close(found.losses, alone.losses + f64([0.125, 1.5]), rtol=1e-14, atol=0)
    (gradient,) = torch.autograd.grad(found.losses.sum(), best_nll)
    assert gradient.tolist() == [0.5, 0.5]
    assert float(found.statistics["nll_loss"]) == 3.25
    assert set(statistic_names(weighted)) == set(found.statistics)
    assert set(statistic_names(plain)) == set(alone.statistics)


def test_the_second_candidate_is_the_rejected_one() -> None:
    """Mirrored s: -ln(1/4) and 1/4 ln((1/4)/(9/10)) + 3/4 ln((3/4)/(1/10))."""
    s = f64([0.0, LN(3.0)])
    torch.testing.assert_close(losses("dpo_pref", s, None, [2]), f64([LN(4.0)]), rtol=1e-13, atol=1e-14)
    expected = f64([0.25 * LN(5 / 18) + 0.75 * LN(7.5)])
    torch.testing.assert_close(losses("exo_pref", s, None, [2]), expected, rtol=1e-13, atol=1e-14)


def random_groups(sizes: list[int], seed: int = 0, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """log-probs, reference log-probs, rewards [C]."""
    generator = torch.Generator().manual_seed(seed)
    reference = -20 - 30 * torch.rand(sum(sizes), generator=generator, dtype=torch.float64)
    logps = reference + spread * torch.randn(sum(sizes), generator=generator, dtype=torch.float64)
    rewards = torch.randn(sum(sizes), generator=generator, dtype=torch.float64)
    return logps.requires_grad_(), reference, rewards


@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences(kind: str) -> None:
    sizes = [2, 2, 2] if kind.endswith("pref") else [2, 5, 3, 4]
    logps, reference, rewards = random_groups(sizes)
    assert torch.autograd.gradcheck(
        lambda x: group_objective(x, reference, rewards, sizes, config(kind)).losses, (logps,), atol=1e-7
    )


@pytest.mark.parametrize("kind", ["exo_rw", "dpo_rw"])
def test_groups_do_not_depend_on_their_neighbours(kind: str) -> None:
    """Every group of a ragged batch has the loss and the gradient that it has alone."""
    sizes = [2, 5, 3, 4]
    logps, reference, rewards = random_groups(sizes)
    together = group_objective(logps, reference, rewards, sizes, config(kind)).losses
    (gradient,) = torch.autograd.grad(together.sum(), logps)
    parts = zip(*(tensor.detach().split(sizes) for tensor in (logps, reference, rewards, gradient)), strict=True)
    for index, (own, ref, reward, expected) in enumerate(parts):
        own = own.clone().requires_grad_()
        loss = group_objective(own, ref, reward, [len(own)], config(kind)).losses
        torch.testing.assert_close(loss[0], together[index], rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), own)[0], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["exo_rw", "exo_pref"])
def test_exo_gradient_is_a_weighted_likelihood_whose_weights_sum_to_zero(kind: str) -> None:
    """dL = sum_k c_k d log pi_k with c_k = beta_pi p_k ((log p_k - log p_r,k) - L) and sum_k c_k = 0."""
    sizes = [2, 2] if kind == "exo_pref" else [4, 3]
    logps, reference, rewards = random_groups(sizes)
    loss = config(kind)
    values = group_objective(logps, reference, rewards, sizes, loss).losses
    (gradient,) = torch.autograd.grad(values.sum(), logps)
    parts = zip(*(tensor.detach().split(sizes) for tensor in (logps - reference, rewards, gradient)), strict=True)
    for (log_ratio, reward, actual), value in zip(parts, values.detach(), strict=True):
        log_p = torch.log_softmax(loss.beta_pi * log_ratio, 0)
        target = torch.log_softmax(reward / loss.beta_r, 0) if kind == "exo_rw" else f64([LN(0.9), LN(0.1)])
        weights = loss.beta_pi * log_p.exp() * ((log_p - target) - value)
        torch.testing.assert_close(actual, weights, rtol=1e-11, atol=1e-14)
        assert abs(actual.sum().item()) < 1e-14


@pytest.mark.parametrize("m", [-10.0, -5.0, -1.0, 0.0, 2.0, 6.9, 12.0])
@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 0.4])
def test_exo_pref_derivative(m: float, epsilon: float) -> None:
    """dL/dm = q (1 - q) (m - m*), q = sigmoid(m), m* = ln((1 - epsilon)/epsilon)."""
    s = f64([m, 0.0]).requires_grad_()
    (gradient,) = torch.autograd.grad(losses("exo_pref", s, None, [2], label_smoothing=epsilon).sum(), s)
    q = 1 / (1 + math.exp(-m))
    expected = q * (1 - q) * (m - LN((1 - epsilon) / epsilon))
    torch.testing.assert_close(gradient, f64([expected, -expected]), rtol=1e-9, atol=1e-14)


def test_exo_pref_dead_zone_figures() -> None:
    """The figures of the numerics notes: at epsilon = 1e-3 |dL/dm| is 0.079 at m = -5 and 7.7e-4 at m = -10."""
    for m, figure in ((-5.0, 0.079), (-10.0, 7.7e-4)):
        s = f64([m, 0.0]).requires_grad_()
        (gradient,) = torch.autograd.grad(losses("exo_pref", s, None, [2], label_smoothing=1e-3).sum(), s)
        assert abs(gradient[0].item()) == pytest.approx(figure, rel=0.01)


def test_exo_pref_has_its_minimum_at_the_target() -> None:
    s = f64([LN(0.999 / 0.001), 0.0]).requires_grad_()
    value = losses("exo_pref", s, None, [2], label_smoothing=1e-3)
    (gradient,) = torch.autograd.grad(value.sum(), s)
    torch.testing.assert_close(value.detach(), f64([0.0]), rtol=0.0, atol=1e-15)
    assert gradient.abs().max() < 1e-15


def test_dpo_rw_of_a_one_hot_target_is_dpo_pref() -> None:
    """Rewards 2000 apart over beta_r = 2: the rejected candidate's share of p_r is exp(-1000) = 0 exactly."""
    s = f64([0.3, -1.1, -2.0, 4.0]).requires_grad_()
    one_hot = losses("dpo_rw", s, f64([1000.0, 0.0, 1000.0, 0.0]), [2, 2])
    pairs = losses("dpo_pref", s, None, [2, 2])
    torch.testing.assert_close(one_hot, pairs, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(
        torch.autograd.grad(one_hot.sum(), s)[0], torch.autograd.grad(pairs.sum(), s)[0], rtol=1e-13, atol=0.0
    )


@pytest.mark.parametrize("epsilon", [1e-3, 0.2])
def test_exo_rw_at_the_matching_reward_gap_is_exo_pref(epsilon: float) -> None:
    """(r_w - r_l) / beta_r = ln((1 - epsilon)/epsilon)."""
    s = f64([0.3, -1.1, -2.0, 4.0]).requires_grad_()
    gap = LN((1 - epsilon) / epsilon)
    from_rewards = losses("exo_rw", s, f64([gap, 0.0, gap - 3.0, -3.0]), [2, 2])
    pairs = losses("exo_pref", s, None, [2, 2], label_smoothing=epsilon)
    torch.testing.assert_close(from_rewards, pairs, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(
        torch.autograd.grad(from_rewards.sum(), s)[0], torch.autograd.grad(pairs.sum(), s)[0], rtol=1e-12, atol=1e-15
    )


def test_released_code_is_the_documented_epsilon() -> None:
    """The authors' code takes KL(p_theta || (0, -10)) with the target left unnormalised in log space: at epsilon =
    sigmoid(-10) the same gradient, and a loss that differs by the constant ln(1 + exp(-10)).
    """
    epsilon = 4.5397868702434395e-05
    assert epsilon == pytest.approx(1 / (1 + math.exp(10)), rel=1e-15)
    for m in (-12.0, -1.0, 0.0, 3.0, 9.0):
        s = f64([m, 0.0]).requires_grad_()
        log_p = torch.log_softmax(s, 0)
        released = (log_p.exp() * (log_p - f64([0.0, -10.0]))).sum()
        ours = losses("exo_pref", s, None, [2], label_smoothing=epsilon)[0]
        torch.testing.assert_close(
            torch.autograd.grad(ours, s)[0], torch.autograd.grad(released, s)[0], rtol=1e-10, atol=1e-15
        )
        assert (ours - released).item() == pytest.approx(math.log1p(math.exp(-10)), abs=1e-13)


def test_equal_rewards_are_a_uniform_target() -> None:
    """EXO_rw is then ln K minus the entropy of p_theta: for p_theta = (1/2, 1/4, 1/4), ln 3 - 3/2 ln 2."""
    s = f64([LN(2.0), 0.0, 0.0])
    value = losses("exo_rw", s, f64([7.0, 7.0, 7.0]), [3])
    torch.testing.assert_close(value, f64([LN(3) - 1.5 * LN(2)]), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_log_ratios_stay_finite(kind: str) -> None:
    """Log-ratios of thousands of nats and rewards of thousands: finite loss, finite gradient, also where ragged."""
    sizes = [2, 2] if kind.endswith("pref") else [2, 3]
    logps = f64([-9000.0, -10.0, -10.0, -9000.0, -4000.0][: sum(sizes)]).requires_grad_()
    rewards = f64([3000.0, -3000.0, -3000.0, 3000.0, 0.0][: sum(sizes)])
    values = group_objective(logps, torch.full_like(logps, -100.0), rewards, sizes, config(kind)).losses
    values.sum().backward()
    assert values.isfinite().all() and logps.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["exo_pref", "dpo_pref"])
def test_several_rejected_by_hand(kind: str) -> None:
    """epsilon / (K - 1) on each rejected one, with the K of its own group; -log softmax of the chosen one."""
    ratios, epsilon, beta = [[0.3, -0.4], [1.1, -0.2, 0.8, 0.5], [0.1, 0.9, -0.7]], 0.2, 0.5
    expected = []
    for group in ratios:
        weights = [math.exp(beta * s) for s in group]
        p = [weight / sum(weights) for weight in weights]
        target = [1 - epsilon] + [epsilon / (len(group) - 1)] * (len(group) - 1)
        exo = sum(a * math.log(a / b) for a, b in zip(p, target, strict=True))
        expected.append(exo if kind == "exo_pref" else -math.log(p[0]))
    s = f64([x for group in ratios for x in group]).requires_grad_()
    found = group_objective(
        s, torch.zeros_like(s), None, [2, 4, 3], config(kind, beta_pi=beta, label_smoothing=epsilon)
    )
    torch.testing.assert_close(found.losses, f64(expected))
    (gradient,) = torch.autograd.grad(found.losses.sum(), s)
    assert gradient.isfinite().all() and (gradient != 0).all()
    assert all(value.isfinite() for value in found.statistics.values())
    # The implicit reward of the best rejected one counts: 2 of the 3 chosen ones are above it.
    assert found.statistics["rewards/accuracies"] == 2
    torch.testing.assert_close(found.statistics["rewards/rejected"], f64([beta * (-0.4 + 0.8 + 0.9)])[0])


@pytest.mark.parametrize("kind", ["exo_pref", "dpo_pref"])
def test_a_pair_among_larger_groups_is_the_pair(kind: str) -> None:
    """Bit by bit, with its gradient; for dpo_pref it is -log sigmoid."""
    s = f64([0.3, -0.4, 1.1, -0.2, 0.8, 40.0, -41.0]).requires_grad_()
    zeros = torch.zeros_like(s)
    mixed = group_objective(s, zeros, None, [2, 3, 2], config(kind)).losses
    for place, numbers in ((0, [0, 1]), (2, [5, 6])):
        alone = group_objective(s[numbers], zeros[numbers], None, [2], config(kind)).losses
        assert torch.equal(mixed[place : place + 1], alone)
        if kind == "dpo_pref":
            chosen, rejected = s[numbers]
            margin = LossConfig().beta_pi * chosen - LossConfig().beta_pi * rejected
            assert torch.equal(alone[0], -torch.nn.functional.logsigmoid(margin))
        gradients = [torch.autograd.grad(loss, s, retain_graph=True)[0] for loss in (mixed[place], alone[0])]
        assert torch.equal(*gradients)


def test_callers_tensors_are_not_modified() -> None:
    for kind in KINDS:
        logps, reference, rewards = random_groups([2, 2])
        copies = [tensor.detach().clone() for tensor in (logps, reference, rewards)]
        group_objective(logps, reference, rewards, [2, 2], config(kind)).losses.sum().backward()
        assert all(torch.equal(a, b) for a, b in zip((logps, reference, rewards), copies, strict=True))
