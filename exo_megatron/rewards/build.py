"""From settings to a reward source."""

from __future__ import annotations

from typing import TypeVar

import torch

from exo_megatron.config.sections import RewardConfig
from exo_megatron.errors import ConfigError
from exo_megatron.rewards.source import RewardSource

T = TypeVar("T")


def build_reward(config: RewardConfig, device: torch.device) -> RewardSource:
    """The reward source of `config`; models go to `device`. Raises RewardError if it cannot be loaded."""
    if config.kind == "function":
        from exo_megatron.rewards.function import load_function

        return load_function(_required(config.function, "reward.function"))
    from exo_megatron.rewards.classifier import load_classifier

    path = _required(config.path, "reward.path")
    return load_classifier(path, label=config.label, batch_size=config.batch_size, device=device)


def _required(value: T | None, key: str) -> T:
    if value is None:
        raise ConfigError(key, "missing", expected="a value for this kind of reward", fix=f"set {key}")
    return value
