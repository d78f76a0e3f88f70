"""Learning rates by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from exo_megatron.config.sections import OptimizerConfig
from exo_megatron.training.optimizer import learning_rate


def rates(total: int, **settings: Any) -> list[float]:
    config = OptimizerConfig(lr=8.0, **settings)
    return [learning_rate(step, total, config) for step in range(total)]


def test_warmup_rises_in_equal_steps_and_the_first_step_moves() -> None:
    assert rates(6, schedule="constant", warmup_steps=4) == pytest.approx([2.0, 4.0, 6.0, 8.0, 8.0, 8.0])


def test_linear_falls_from_lr_towards_the_floor() -> None:
    """Four steps on the line from 8 to 0, which would be reached at the fifth; with a floor of 1/4, to 2."""
    assert rates(4, schedule="linear") == pytest.approx([8.0, 6.0, 4.0, 2.0])
    assert rates(4, schedule="linear", min_lr_ratio=0.25) == pytest.approx([8.0, 6.5, 5.0, 3.5])


def test_linear_after_warmup() -> None:
    assert rates(6, schedule="linear", warmup_steps=2) == pytest.approx([4.0, 8.0, 8.0, 6.0, 4.0, 2.0])


def test_cosine() -> None:
    """8 (1 + cos(pi t / 4)) / 2 for t = 0..3; with a floor of 1/2, 4 + half of that."""
    half = math.sqrt(0.5)
    assert rates(4, schedule="cosine") == pytest.approx([8.0, 4 + 4 * half, 4.0, 4 - 4 * half])
    assert rates(4, schedule="cosine", min_lr_ratio=0.5) == pytest.approx([8.0, 6 + 2 * half, 6.0, 6 - 2 * half])


def test_warmup_longer_than_the_run() -> None:
    assert rates(2, schedule="linear", warmup_steps=4) == pytest.approx([2.0, 4.0])
