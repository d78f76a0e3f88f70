"""Learning rate as a function of the step: warm-up, then constant, linear or cosine decay."""

from __future__ import annotations

import math

from exo_megatron.config.sections import OptimizerConfig


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of optimizer step `step` (0-based) of `total_steps`.

    Rises linearly over `warmup_steps` (the first step already moves), then falls to lr * min_lr_ratio, which it
    would reach at step `total_steps`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left)
