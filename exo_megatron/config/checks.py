"""What the type of a single key cannot say: settings that contradict each other or have no effect together."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exo_megatron.config.document import Key, dotted, show
from exo_megatron.config.sections import (
    BatchConfig,
    LossConfig,
    OptimizerConfig,
    RewardConfig,
    SaveConfig,
    Section,
)
from exo_megatron.config.stages import AlignConfig, EvaluateConfig, ScoreConfig, SftConfig, StageConfig

_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_MODEL_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Problem:
    """A contradiction: the key to change, what was seen, what would be accepted, what to do."""

    key: Key
    problem: str
    expected: str
    fix: str


def find_problems(config: StageConfig) -> Iterator[Problem]:
    """All contradictions of one stage's configuration."""
    yield from _check_output(config)
    match config:
        case AlignConfig():
            yield from _check_training(config.batch, config.optimizer, config.save)
            yield from _check_loss(config.loss, config.candidates)
        case SftConfig():
            yield from _check_training(config.batch, config.optimizer, config.save)
        case ScoreConfig():
            yield from _check_reward(config.reward)
        case EvaluateConfig():
            yield from _check_reward(config.reward)
            yield from _check_names(config.models)


def paths(section: Section, prefix: Key = ()) -> Iterator[tuple[Key, Path]]:
    """All paths of a configuration with their keys, `data.path` included, `output` not."""
    for name, value in section:
        yield from () if (*prefix, name) == ("output",) else _paths(value, (*prefix, name))


def within(path: Path, root: Path) -> bool:
    """Whether `path` is `root` or lies below it."""
    return os.path.commonpath((os.path.abspath(path), os.path.abspath(root))) == os.path.abspath(root)


def _paths(value: Any, key: Key) -> Iterator[tuple[Key, Path]]:
    match value:
        case Path():
            yield key, value
        case str() if key[-2:] == ("data", "path"):
            yield key, Path(value)
        case Section():
            yield from paths(value, key)
        case dict():
            for name, inner in value.items():
                yield from _paths(inner, (*key, name))


def _check_output(config: StageConfig) -> Iterator[Problem]:
    for key, path in paths(config):
        if os.path.abspath(path) == os.path.abspath(config.output):
            yield Problem(
                ("output",),
                f"got {show(str(config.output))}, which is also {dotted(key)}",
                "a directory that the stage does not read",
                "choose another output",
            )


def _check_training(batch: BatchConfig, optimizer: OptimizerConfig, save: SaveConfig) -> Iterator[Problem]:
    last = batch.max_steps
    if last is not None and save.interval is not None and save.interval > last:
        yield Problem(
            ("save", "interval"),
            f"got {save.interval}, but the run ends after {last} steps (batch.max_steps)",
            f"at most {last}, or null",
            "lower save.interval, or leave it out to save at the end only",
        )
    if last is not None and optimizer.warmup_steps > last:
        yield Problem(
            ("optimizer", "warmup_steps"),
            f"got {optimizer.warmup_steps}, but the run ends after {last} steps (batch.max_steps)",
            f"at most {last}",
            "lower optimizer.warmup_steps",
        )
    if optimizer.schedule == "constant" and optimizer.min_lr_ratio != 0:
        yield _no_effect(("optimizer", "min_lr_ratio"), optimizer.min_lr_ratio, "schedule is constant")
    if save.all_steps and save.interval is None:
        yield Problem(
            ("save", "all_steps"),
            "got true, but without save.interval only the last step is saved",
            "save.interval with save.all_steps",
            "set save.interval",
        )
    if save.all_steps and save.keep != _default(SaveConfig, "keep"):
        yield _no_effect(("save", "keep"), save.keep, "save.all_steps keeps every checkpoint")


def _check_loss(loss: LossConfig, candidates: int | None) -> Iterator[Problem]:
    pairs = loss.kind in ("exo_pref", "dpo_pref")
    if pairs and candidates not in (None, 2):
        yield Problem(
            ("candidates",),
            f"got {candidates}, but loss.kind {loss.kind} compares two",
            "2 or null",
            "remove candidates, or choose exo_rw or dpo_rw",
        )
    if pairs and loss.beta_r != _default(LossConfig, "beta_r"):
        yield _no_effect(("loss", "beta_r"), loss.beta_r, f"loss.kind {loss.kind} uses no rewards")
    if loss.kind != "exo_pref" and loss.label_smoothing != _default(LossConfig, "label_smoothing"):
        yield _no_effect(("loss", "label_smoothing"), loss.label_smoothing, f"loss.kind {loss.kind} has none")


def _check_reward(reward: RewardConfig) -> Iterator[Problem]:
    match reward.kind:
        case "function":
            if reward.function is None or not _FUNCTION.fullmatch(reward.function):
                yield Problem(
                    ("reward", "function"),
                    "missing" if reward.function is None else f"got {show(reward.function)}",
                    "package.module:name of a Python function",
                    "set reward.function, for example my_rewards.sentiment:score",
                )
            for name, value in (("path", reward.path), ("label", reward.label)):
                if value is not None:
                    yield _no_effect(("reward", name), value, "reward.kind is function")
        case "hf_classifier":
            if reward.path is None:
                yield Problem(
                    ("reward", "path"),
                    "missing",
                    "directory of a local HF sequence classifier",
                    "set reward.path",
                )
            if reward.function is not None:
                yield _no_effect(("reward", "function"), reward.function, "reward.kind is hf_classifier")


def _check_names(models: dict[str, Path]) -> Iterator[Problem]:
    for name in models:
        if not _MODEL_NAME.fullmatch(name):
            yield Problem(
                ("models", name), f"got the name {show(name)}", "letters, digits, _, . and -", "rename the model"
            )


def _no_effect(key: Key, value: object, why: str) -> Problem:
    return Problem(
        key, f"got {show(value)}, which has no effect: {why}", "no such setting here", f"remove {dotted(key)}"
    )


def _default(section: type[Section], name: str) -> object:
    return section.model_fields[name].default
