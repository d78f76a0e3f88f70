"""Validation of a document: the type of every key, then the combinations of keys.

The result is a frozen configuration.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from exo_megatron.config.describe import (
    NAMES_ELSEWHERE,
    VALUES_ELSEWHERE,
    describe_key,
    describe_keys,
    nearest,
    section_at,
)
from exo_megatron.config.document import COMMAND_LINE, Document, Key, dotted, show
from exo_megatron.config.losses import COMMON_KEYS, FUNCTION, FUNCTION_KEYS, LOSSES, kinds_comparing
from exo_megatron.config.sections import (
    BatchConfig,
    DataConfig,
    LossConfig,
    OptimizerConfig,
    RewardConfig,
    SaveConfig,
    Section,
)
from exo_megatron.config.stages import (
    CANDIDATES_DIRECTORY,
    CANDIDATES_FILE,
    AlignConfig,
    EvaluateConfig,
    RolloutConfig,
    ScoreConfig,
    SftConfig,
    StageConfig,
)
from exo_megatron.errors import ConfigError

_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_MODEL_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Problem:
    """A contradiction: the key to change, the flaw, the accepted values and the fix."""

    key: Key
    problem: str
    expected: str
    fix: str


def find_problems(config: StageConfig) -> Iterator[Problem]:
    """List all contradictions in one stage's configuration."""
    yield from _check_output(config)
    match config:
        case AlignConfig():
            yield from _check_training(config.batch, config.optimizer, config.save)
            yield from _check_loss(config.loss)
            yield from _check_pairs(config)
            yield from _check_data(config.data)
        case SftConfig():
            yield from _check_training(config.batch, config.optimizer, config.save)
        case RolloutConfig():
            yield from _check_data(config.data)
        case ScoreConfig():
            yield from _check_reward(config.reward)
        case EvaluateConfig():
            yield from _check_reward(config.reward)
            yield from _check_names(config.models)
            yield from _check_data(config.data)


def paths(section: Section, prefix: Key = ()) -> Iterator[tuple[Key, Path]]:
    """List all paths in a configuration with their keys, with `data.path` but without `output`."""
    for name, value in section:
        yield from () if (*prefix, name) == ("output",) else _paths(value, (*prefix, name))


def within(path: Path, root: Path) -> bool:
    """Tell whether `path` is `root` or lies below it."""
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
    if not os.path.basename(os.path.abspath(config.output)):
        yield Problem(
            ("output",), f"got {show(str(config.output))}", "a directory with a name", "choose another output"
        )
    for key, path in paths(config):
        same = os.path.abspath(path) == os.path.abspath(config.output)
        if same or any(within(path, config.output / name) for name in (CANDIDATES_DIRECTORY, CANDIDATES_FILE)):
            yield Problem(
                ("output",),
                f"got {show(str(config.output))}, which {'is also' if same else 'holds'} {dotted(key)}",
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


def _check_loss(loss: LossConfig) -> Iterator[Problem]:
    if loss.kind == FUNCTION:
        yield from _check_function(("loss", "function"), loss.function, "my_losses.clipped:loss")
        used: tuple[str, ...] = FUNCTION_KEYS
    else:
        used = LOSSES[loss.kind].keys
    for name, value in loss:
        if name not in (*COMMON_KEYS, *used) and value != _default(LossConfig, name):
            flaw = _no_effect(("loss", name), value, f"loss.kind is {loss.kind}")
            yield replace(flaw, fix=f"set loss.kind={FUNCTION}, or {flaw.fix}") if name == "function" else flaw


def _check_pairs(config: AlignConfig) -> Iterator[Problem]:
    """Check the keys about pairs. `load_groups` does it for a loss of the user's, whose spec it gets."""
    kind = config.loss.kind
    if kind == FUNCTION:
        return
    if LOSSES[kind].compares == "rewards":
        for name, value in (("pairs", config.pairs), ("ties", config.ties)):
            if value != _default(AlignConfig, name):
                yield _no_effect((name,), value, f"loss.kind {kind} compares rewards")
    elif config.pairs == "two_draws" and config.candidates not in (None, 2):
        yield Problem(
            ("candidates",),
            f"got {config.candidates}, but loss.kind {kind} compares two and pairs is two_draws",
            "2 or null",
            f"remove candidates, set pairs=best_and_worst, or choose {kinds_comparing('rewards')}",
        )


def _check_data(data: DataConfig) -> Iterator[Problem]:
    """Check the keys that only `sft` uses."""
    if data.train_on != _default(DataConfig, "train_on"):
        yield _no_effect(("data", "train_on"), data.train_on, "only sft trains on conversations")


def _check_function(key: Key, value: str | None, example: str) -> Iterator[Problem]:
    if value is None or not _FUNCTION.fullmatch(value):
        yield Problem(
            key,
            "missing" if value is None else f"got {show(value)}",
            "package.module:name of a Python function",
            f"set {dotted(key)}, for example {example}",
        )


def _check_reward(reward: RewardConfig) -> Iterator[Problem]:
    match reward.kind:
        case "function":
            yield from _check_function(("reward", "function"), reward.function, "my_rewards.sentiment:score")
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


SectionT = TypeVar("SectionT", bound=Section)
StageT = TypeVar("StageT", bound=StageConfig)


def validate(section: type[SectionT], document: Document) -> SectionT:
    """Convert a document to a configuration class.

    No type is converted, except an integer to a number and a text to a path. Raises ConfigError for
    the first flaw, with the number of further ones. Unknown keys come before other flaws, because a
    misspelt key is also a missing one.
    """
    data = {**document.data, **_complete_sections(section, document)}
    try:
        return section.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise _explain(error, section, document) from None


def validate_stage(section: type[StageT], document: Document) -> StageT:
    """Validate the document as a stage's configuration, combinations of keys included.

    Raises ConfigError for the first flaw or contradiction.
    """
    config = validate(section, document)
    for flaw in find_problems(config):
        raise ConfigError(document.where(flaw.key), flaw.problem, expected=flaw.expected, fix=flaw.fix)
    return config


def validate_partial(section: type[Section], document: Document) -> None:
    """Validate a part of a section, in which keys may be missing.

    Raises ConfigError for the first flaw of a key that is present.
    """
    try:
        section.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        if any(flaw["type"] != "missing" for flaw in error.errors(include_url=False)):
            raise _explain(error, section, document, skip="missing") from None


def _complete_sections(section: type[Section], document: Document) -> dict[str, Any]:
    """Fill in sections that are given in part, with the defaults that this stage has for them.

    The default of optimizer.lr in `sft` is 1e-5. Setting only optimizer.weight_decay must not bring
    back 1e-6, the default of the section itself.
    """
    completed = {}
    for name, info in section.model_fields.items():
        given = document.data.get(name)
        if isinstance(given, dict) and isinstance(info.default, Section):
            completed[name] = {**info.default.model_dump(mode="json", exclude_unset=True), **given}
    return completed


def _explain(
    error: ValidationError, section: type[Section], document: Document, *, skip: str | None = None
) -> ConfigError:
    """Make one ConfigError of pydantic's list of errors, without those of the type `skip`."""
    flaws = [flaw for flaw in error.errors(include_url=False) if flaw["type"] != skip]
    flaws.sort(key=lambda flaw: flaw["type"] != "extra_forbidden")
    key: Key = flaws[0]["loc"]
    problem, expected, fix = _explain_flaw(flaws[0]["type"], key, flaws[0]["input"], section, document)
    others = flaws[1:]
    if flaws[0]["type"] == "missing":
        problem += _also_missing([document.name(flaw["loc"]) for flaw in others if flaw["type"] == "missing"])
        others = [flaw for flaw in others if flaw["type"] != "missing"]
    if others:
        problem += f" (and {len(others)} more)"
    return ConfigError(document.where(key), problem, expected=expected, fix=fix)


def _also_missing(names: Sequence[str]) -> str:
    """Name further keys that are missing, as the end of a sentence."""
    if not names:
        return ""
    *others, last = names
    return f", as are {', '.join(others)} and {last}" if others else f", as is {last}"


def _explain_flaw(kind: str, key: Key, value: Any, section: type[Section], document: Document) -> tuple[str, str, str]:
    """Return problem, expectation and fix of a flaw."""
    if kind == "extra_forbidden":
        return _unknown(key, section, document)
    expected, name = describe_key(section, key), document.name(key)
    if kind == "missing":
        return "missing", expected, f"set it in the file, or pass {name}=VALUE"
    return f"got {show(value)}", expected, _fix_value(kind, value, expected, name)


def _unknown(key: Key, section: type[Section], document: Document) -> tuple[str, str, str]:
    *around, name = key
    parent = section_at(section, tuple(around))
    known = [] if parent is None else list(parent.model_fields)
    meant = _meant(key, known, [each.key for each in describe_keys(section)], document.name(()).rpartition(".")[2])
    fix = "remove it" if not meant else "write " + " and ".join(_as_written(each, key, document) for each in meant)
    return f"unknown key {str(name)!r}", "one of " + ", ".join(known), fix


def _meant(key: Key, known: Sequence[str], keys: Sequence[str], section: str) -> list[str]:
    """Find what an unknown key was probably meant to be: a dotted key of `keys`, several, or none.

    It is our key for another library's name, else a key of the same section, which has the keys
    `known`, with a similar name, else a key elsewhere with the same last part.
    `section` is the name of the section where the document is only that.
    """
    *around, name = map(str, key)
    ours = (NAMES_ELSEWHERE.get(dotted(key)) or NAMES_ELSEWHERE.get(name, "")).split()
    elsewhere = [short for each in ours for short in (each, each.removeprefix(f"{section}.")) if short in keys]
    elsewhere = list(dict.fromkeys(elsewhere))
    if elsewhere:
        return elsewhere
    near = nearest(name, known)
    if near is not None:
        return [".".join([*around, near])]
    return [each for each in keys if each.split(".")[-1] == name][:1]


def _as_written(meant: str, key: Key, document: Document) -> str:
    """Name the key `meant` as it is written in the place of `key`.

    A file has the key of a section without the section's name. The command line has whole keys.
    """
    origin = document.origins.get(key)
    if origin is not None and origin.source == COMMAND_LINE:
        return origin.key.removesuffix(dotted(key)) + meant
    return meant.removeprefix(f"{dotted(key[:-1])}.")


def _fix_value(kind: str, value: Any, expected: str, name: str) -> str:
    match kind, value:
        case "literal_error", str():
            for key, values in VALUES_ELSEWHERE.items():
                if value in values and f".{name}".endswith(f".{key}"):
                    return f"write {values[value]}"
            near = nearest(value, expected.removeprefix("one of ").split(", "))
            return f"write {near}" if near else f"change {name}"
        case "int_type" | "float_type" | "bool_type", str() if _is_plain(value, kind):
            return "remove the quotes"
        case "bool_type", "yes" | "on" | "no" | "off":
            return "write " + ("true" if value in ("yes", "on") else "false")
        case "int_type" | "int_from_float", float() if value.is_integer():
            return f"write {int(value)}"
        case "string_type" | "path_type", int() | float() if not isinstance(value, bool):
            return "put it in quotes"
        case "model_type", None:
            return "write its keys below it, or remove it"
    return f"change {name}"


def _is_plain(text: str, kind: str) -> bool:
    """Tell whether the text is of the wanted kind once its quotes are removed."""
    if kind == "bool_type":
        return text.lower() in ("true", "false")
    try:
        (int if kind == "int_type" else float)(text)
    except ValueError:
        return False
    return True
