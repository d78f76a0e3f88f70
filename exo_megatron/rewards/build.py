"""The choice of a reward source by its settings, and the digest of both."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from exo_megatron.config.sections import RewardConfig
from exo_megatron.errors import ConfigError
from exo_megatron.rewards.source import RewardSource
from exo_megatron.utils.files import sha256_file

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


def identify_reward(config: RewardConfig) -> str:
    """Return a digest of the settings of a reward source that has been built, and of its own files.

    These are the module of a function, and the sizes and times of the files of a classifier.
    """
    parts: list[object] = [config.digest_json()]
    if config.function is not None:
        file = sys.modules[config.function.partition(":")[0]].__file__
        parts.append(None if file is None else sha256_file(Path(file)))
    if config.path is not None:
        found = ((path.name, path.stat()) for path in sorted(config.path.iterdir()))
        parts += [(name, status.st_size, status.st_mtime_ns) for name, status in found]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _required(value: T | None, key: str) -> T:
    if value is None:
        raise ConfigError(key, "missing", expected="a value for this kind of reward", fix=f"set {key}")
    return value
