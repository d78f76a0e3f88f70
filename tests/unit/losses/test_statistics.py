"""What dashboards show of a batch, worked by hand. Sums over the groups; the step divides by their number."""

from __future__ import annotations

import math

import pytest
import torch

from exo_megatron.config.sections import LossConfig
from exo_megatron.losses.objective import group_objective

LN = math.log

# beta_pi = 1/2, beta_r = 1.
# Group A (K = 2): log-ratios 2 ln 3 and 0, so s = (ln 3, 0), p_theta = (3/4, 1/4); rewards (0, ln 4), so
#   p_r = (1/5, 4/5): the second candidate is chosen, the first rejected.
# Group B (K = 3): log-ratios 0, 2 ln 2, 0, so p_theta = (1/4, 1/2, 1/4); rewards (0, ln 3, ln 2), so
#   p_r = (1/6, 1/2, 1/3): the second is chosen, the first rejected.
REFERENCE = torch.tensor([-10.0, -20.0, -30.0, -40.0, -50.0], dtype=torch.float64)
LOG_RATIO = torch.tensor([2 * LN(3), 0.0, 0.0, 2 * LN(2), 0.0], dtype=torch.float64)
REWARDS = torch.tensor([0.0, LN(4), 0.0, LN(3), LN(2)], dtype=torch.float64)


def entropy(*probabilities: float) -> float:
    return -sum(p * LN(p) for p in probabilities)


EXPECTED = {
    "rewards/chosen": 0.0 + LN(2),
    "rewards/rejected": LN(3) + 0.0,
    "rewards/margins": -LN(3) + LN(2),
    "rewards/accuracies": 0.0 + 1.0,
    "logps/chosen": -20.0 + (-40.0 + 2 * LN(2)),
    "logps/rejected": (-10.0 + 2 * LN(3)) + -30.0,
    "exo/p_best": 1 / 4 + 1 / 2,
    "exo/entropy_policy": entropy(3 / 4, 1 / 4) + entropy(1 / 4, 1 / 2, 1 / 4),
    "exo/entropy_reward": entropy(1 / 5, 4 / 5) + entropy(1 / 6, 1 / 2, 1 / 3),
    # Candidates come from pi_sft, so E_theta[log-ratio] is estimated with weights pi_theta/pi_sft, normalised:
    # A: ratios (9, 1), weights (9/10, 1/10); B: ratios (1, 4, 1), weights (1/6, 2/3, 1/6).
    "exo/kl": 9 / 10 * 2 * LN(3) + 2 / 3 * 2 * LN(2),
    # A: m = s_best - s_favourite = -ln 3 = -1.10, m* = ln(4/5) - ln(1/5) = 1.39: not yet. B: rightly ordered.
    "exo/dead_zone": 0.0,
}


def test_by_hand() -> None:
    loss = LossConfig(kind="exo_rw", beta_pi=0.5, beta_r=1.0)
    statistics = group_objective(REFERENCE + LOG_RATIO, REFERENCE, REWARDS, [2, 3], loss).statistics
    assert {name: value.item() for name, value in statistics.items()} == pytest.approx(EXPECTED, abs=1e-12)
    assert not any(value.requires_grad for value in statistics.values())


@pytest.mark.parametrize(("m", "dead"), [(-7.5, 1.0), (-6.95, 1.0), (-6.85, 0.0), (0.0, 0.0), (7.5, 0.0), (20.0, 0.0)])
def test_dead_zone_of_a_pair(m: float, dead: float) -> None:
    """m* = ln(999) = 6.907 at epsilon = 1e-3; a pair is in the zone below -m*."""
    reference = torch.tensor([-10.0, -10.0], dtype=torch.float64)
    logps = reference + torch.tensor([m / 0.5, 0.0], dtype=torch.float64)
    loss = LossConfig(kind="exo_pref", beta_pi=0.5, label_smoothing=1e-3)
    statistics = group_objective(logps, reference, None, [2], loss).statistics
    assert statistics["exo/dead_zone"].item() == dead


def test_chosen_is_the_first_of_a_preference_pair() -> None:
    reference = torch.tensor([-10.0, -20.0], dtype=torch.float64)
    logps = reference + torch.tensor([1.0, 3.0], dtype=torch.float64)
    for kind in ("exo_pref", "dpo_pref"):
        loss = LossConfig(kind=kind, beta_pi=0.5)
        statistics = group_objective(logps, reference, None, [2], loss).statistics
        assert statistics["rewards/chosen"].item() == 0.5
        assert statistics["rewards/rejected"].item() == 1.5
        assert statistics["rewards/accuracies"].item() == 0.0
        assert statistics["logps/chosen"].item() == -9.0
