"""The choice of a reward source by its settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from exo_megatron.config.sections import RewardConfig
from exo_megatron.errors import ConfigError
from exo_megatron.rewards.source import RewardSource

T = TypeVar("T")


def build_reward(config: RewardConfig, device: torch.device, tell: Callable[[str], object]) -> RewardSource:
    """Build the reward source of `config`. Models go to `device`.

    `tell` gets a line for each thing about the source that the user should know.

    Raises RewardError if the source cannot be loaded, ConfigError if a key that it needs is
    missing.
    """
    if config.kind == "function":
        from exo_megatron.rewards.function import load_reward_function

        return load_reward_function(_required(config.function, "reward.function"))
    from exo_megatron.rewards.classifier import load_classifier

    path = _required(config.path, "reward.path")
    return load_classifier(path, label=config.label, batch_size=config.batch_size, device=device, tell=tell)


def _required(value: T | None, key: str) -> T:
    if value is None:
        raise ConfigError(key, "missing", expected="a value for this kind of reward", fix=f"set {key}")
    return value
