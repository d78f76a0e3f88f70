"""The target distribution p_r."""

from __future__ import annotations

import math

import torch

from exo_megatron.losses.paper import preference_log_target, reward_log_target, sft_loss_sum


def test_preference_target_of_a_pair_and_of_more() -> None:
    """(1 - epsilon) on candidate 0, epsilon shared by the others."""
    pair = preference_log_target(torch.zeros(3, 2, dtype=torch.float64), 0.1)
    assert pair.dtype == torch.float64 and pair.shape == (3, 2)
    torch.testing.assert_close(pair.exp(), torch.tensor([[0.9, 0.1]] * 3, dtype=torch.float64))
    four = preference_log_target(torch.zeros(4, dtype=torch.float64), 0.3)
    torch.testing.assert_close(four.exp(), torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64))


def test_reward_target_by_hand() -> None:
    """beta_r = 0.1: rewards 0.1 ln 3 apart are probabilities 3/4 and 1/4; an absent candidate has none."""
    rewards = torch.tensor([0.1 * math.log(3), 0.0, float("-inf")], dtype=torch.float64)
    target = reward_log_target(rewards, 0.1).exp()
    torch.testing.assert_close(target, torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64))


def test_sft_loss_is_the_negative_sum() -> None:
    logps = torch.tensor([-1.5, -2.0, -0.25], requires_grad=True)
    loss = sft_loss_sum(logps)
    assert loss.dtype == torch.float64 and loss.item() == 3.75
    loss.backward()
    assert logps.grad.tolist() == [-1.0, -1.0, -1.0]
