"""A `run` file: its stages with complete configurations, and the stages that each of them reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exo_megatron.config.describe import nearest, section_class
from exo_megatron.config.document import (
    COMMAND_LINE,
    Document,
    Key,
    Origin,
    Override,
    apply_override,
    config_digest,
    dotted,
    dump_yaml,
    show,
)
from exo_megatron.config.sections import RuntimeConfig, Section
from exo_megatron.config.stages import (
    STAGE_CONFIGS,
    AlignConfig,
    RolloutConfig,
    RunConfig,
    ScoreConfig,
    StageConfig,
    WorkflowStage,
)
from exo_megatron.config.validate import Problem, paths, validate, validate_partial, validate_stage, within
from exo_megatron.errors import ConfigError

COMPUTE_ANEW = "or set reference_logprobs to computed"


def find_disagreements(config: StageConfig, earlier: Sequence[StageConfig]) -> Iterator[Problem]:
    """List the reasons why `align` would refuse the log-probs that an earlier rollout stores."""
    if not isinstance(config, AlignConfig) or config.reference_logprobs != "stored":
        return
    rollout = _rollout_behind(Path(config.data.path), earlier)
    if rollout is None:
        return
    stored, needed = rollout.sampling.temperature, config.loss.temperature
    if stored != needed:
        yield Problem(
            ("loss", "temperature"),
            f"got {needed}, but the rollout stores log-probs at sampling.temperature {stored}",
            f"{stored}",
            f"make both equal, {COMPUTE_ANEW}",
        )
    if rollout.compute.precision != config.compute.precision:
        yield Problem(
            ("compute", "precision"),
            f"got {config.compute.precision}, but the rollout stores log-probs of {rollout.compute.precision}",
            rollout.compute.precision,
            f"make both equal, {COMPUTE_ANEW}",
        )
    key, reference = ("model", config.model) if config.reference is None else ("reference", config.reference)
    drew, judges = (_maker(path, earlier) for path in (rollout.model.checkpoint, reference.checkpoint))
    if drew is not None and judges is not None and drew.output != judges.output:
        yield Problem(
            (key, "checkpoint"),
            f"got {reference.checkpoint}, but the rollout stores log-probs of {rollout.model.checkpoint}",
            "the policy that drew the candidates as the reference",
            f"set reference.checkpoint to it, {COMPUTE_ANEW}",
        )


def _rollout_behind(data: Path, earlier: Sequence[StageConfig]) -> RolloutConfig | None:
    """Find the rollout that draws these candidates, with or without a `score` stage between."""
    match _maker(data, earlier):
        case RolloutConfig() as rollout:
            return rollout
        case ScoreConfig() as score:
            return _rollout_behind(score.candidates, earlier)
    return None


def _maker(path: Path, earlier: Sequence[StageConfig]) -> StageConfig | None:
    """Find the stage whose output is `path` or holds it."""
    return next((each for each in earlier if within(path, each.output)), None)


_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_RESERVED_NAMES = ("output", ".", "..")


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a workflow, ready to be executed.

    `upstream` names the earlier stages whose output this one reads. `digest` is that of the
    configuration and of the upstream stages' digests.
    """

    name: str
    stage: str
    config: StageConfig
    upstream: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class Workflow:
    """An output directory and the stages in order."""

    output: Path
    seed: int
    runtime: RuntimeConfig
    stages: tuple[PlannedStage, ...]

    def render(self) -> str:
        """Write the workflow as YAML with complete stage configurations.

        Loading it gives an equal workflow.
        """
        stages = [
            {"name": each.name, "stage": each.stage, "config": each.config.model_dump(mode="json")}
            for each in self.stages
        ]
        runtime = self.runtime.model_dump(mode="json")
        return dump_yaml({"output": str(self.output), "seed": self.seed, "runtime": runtime, "stages": stages})

    def downstream(self, name: str) -> tuple[PlannedStage, ...]:
        """List the stages that read the output of `name`, directly or through others."""
        affected = {name}
        for each in self.stages:
            if affected.intersection(each.upstream):
                affected.add(each.name)
        return tuple(each for each in self.stages if each.name in affected and each.name != name)


def plan_workflow(document: Document, overrides: Sequence[Override]) -> Workflow:
    """Merge defaults, fill in outputs, seeds and `${...}`, and check every stage.

    Raises ConfigError for any flaw.
    """
    for override in overrides:
        if override.key[0] != "stages" or len(override.key) == 1:
            apply_override(document, override)
    run = validate(RunConfig, document)
    _check_names(run.stages, document)
    _check_defaults(document)
    documents = [_stage_document(index, each, document) for index, each in enumerate(run.stages)]
    for override in overrides:
        if override.key[0] == "stages" and len(override.key) > 1:
            index, key = _find_stage(override, run.stages)
            apply_override(documents[index], replace(override, key=key))
    planned: list[PlannedStage] = []
    for each, stage_document in zip(run.stages, documents, strict=True):
        planned.append(_plan_stage(each, stage_document, run, planned))
    return Workflow(run.output, run.seed, run.runtime, tuple(planned))


def _plan_stage(entry: WorkflowStage, document: Document, run: RunConfig, earlier: list[PlannedStage]) -> PlannedStage:
    document.data.setdefault("output", str(run.output / entry.name))
    document.data.setdefault("seed", run.seed)
    document.data.setdefault("runtime", run.runtime.model_dump(mode="json"))
    known = {"output": str(run.output), **{each.name: str(each.config.output) for each in earlier}}
    later = [each.name for each in run.stages if each.name not in known]
    document.data = _substitute(document.data, (), document, known, later)
    config = validate_stage(STAGE_CONFIGS[entry.stage], document)
    _check_output(config, document, run, earlier)
    _check_runtime(config, document, run)
    for flaw in find_disagreements(config, [each.config for each in earlier]):
        raise ConfigError(document.where(flaw.key), flaw.problem, expected=flaw.expected, fix=flaw.fix)
    upstream = {each.name: each.digest for each in earlier if _reads(config, each.config.output)}
    return PlannedStage(entry.name, entry.stage, config, tuple(upstream), config_digest(config, upstream))


def _check_output(config: StageConfig, document: Document, run: RunConfig, earlier: list[PlannedStage]) -> None:
    """Raise ConfigError if the stage's directory holds the output of another stage or of the run.

    The directory is moved away when the stage has to start again.
    """
    others = {"the run": run.output, **{f"stage {each.name}": each.config.output for each in earlier}}
    for owner, other in others.items():
        if within(other, config.output):
            raise ConfigError(
                document.where(("output",)),
                f"got {show(str(config.output))}, which is or holds the output of {owner}",
                expected="a directory of its own for every stage",
                fix="choose another output",
            )


def _check_runtime(config: StageConfig, document: Document, run: RunConfig) -> None:
    """Raise ConfigError if a stage would wait otherwise than the run, whose processes meet once for all stages."""
    if config.runtime != run.runtime:
        raise ConfigError(
            document.where(("runtime",)),
            "differs from `runtime` of the run, whose processes meet once for all stages",
            expected="`runtime` at the top of the file only",
            fix="move it there",
        )


def _reads(config: StageConfig, output: Path) -> bool:
    """Tell whether a path in the configuration is `output` or lies below it."""
    return any(within(path, output) for _, path in paths(config))


def _stage_document(index: int, entry: WorkflowStage, document: Document) -> Document:
    """Merge the stage's own configuration over the defaults of the sections of its class that take them."""
    fields = STAGE_CONFIGS[entry.stage].model_fields
    stage_key: Key = ("stages", index, "config")
    shown = f"stages.{entry.name}"
    entry_origin = document.origins[("stages", index)]
    merged = Document({}, {(): Origin(entry_origin.source, shown)})
    for name, value in document.data.get("defaults", {}).items():
        section = section_class(fields[name].annotation) if name in fields else None
        if section is not None and section.takes_defaults:
            inner = {key[2:]: origin for key, origin in document.origins.items() if key[:2] == ("defaults", name)}
            merged.put((name,), deepcopy(value), inner)
    for key, origin in document.origins.items():
        if key[:3] == stage_key:
            merged.origins[key[3:]] = Origin(origin.source, ".".join([shown, *map(str, key[3:])]))
    _merge(merged.data, deepcopy(entry.config))
    return merged


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> None:
    """Merge `top` into `base` in place: mappings entry by entry, other values as a whole."""
    for name, value in top.items():
        inner = base.get(name)
        if isinstance(inner, dict) and isinstance(value, dict):
            _merge(inner, value)
        else:
            base[name] = value


def _check_names(stages: Sequence[WorkflowStage], document: Document) -> None:
    seen: set[str] = set()
    for index, each in enumerate(stages):
        if each.name in seen or each.name in _RESERVED_NAMES:
            raise ConfigError(
                document.where(("stages", index, "name")),
                f"the name {each.name!r} is {'taken by an earlier stage' if each.name in seen else 'reserved'}",
                expected="a name of its own for every stage",
                fix="rename the stage",
            )
        seen.add(each.name)


def _check_defaults(document: Document) -> None:
    """Raise ConfigError unless every default is a section of a stage that accepts its keys."""
    sections: dict[str, type[Section]] = {}
    for config in STAGE_CONFIGS.values():
        found = {name: section_class(info.annotation) for name, info in config.model_fields.items()}
        sections.update({name: each for name, each in found.items() if each is not None and each.takes_defaults})
    for name, value in document.data.get("defaults", {}).items():
        if name not in sections:
            near = nearest(name, sections)
            raise ConfigError(
                document.where(("defaults", name)),
                f"no stage has a section {name!r}",
                expected="one of " + ", ".join(sections),
                fix=f"write {near}" if near else "set it in the stages",
            )
        if not isinstance(value, dict):
            raise ConfigError(
                document.where(("defaults", name)),
                f"got {show(value)}",
                expected=f"section ({', '.join(sections[name].model_fields)})",
                fix="write its keys below it, or remove it",
            )
        inner = {key[2:]: origin for key, origin in document.origins.items() if key[:2] == ("defaults", name)}
        validate_partial(sections[name], Document(value, inner))


def _find_stage(override: Override, stages: Sequence[WorkflowStage]) -> tuple[int, Key]:
    """Find the stage and the key that `stages.NAME.KEY` means.

    Names may hold dots: of several stages that fit, the one with the longest name is taken.
    """
    path = dotted(override.key[1:])
    fitting = [(len(each.name), index) for index, each in enumerate(stages) if path.startswith(f"{each.name}.")]
    if fitting:
        length, index = max(fitting)
        return index, tuple(path[length + 1 :].split("."))
    names = [each.name for each in stages]
    near = nearest(str(override.key[1]), names)
    known = str(override.key[1]) in names
    raise ConfigError(
        f"{COMMAND_LINE}: {dotted(override.key)}",
        "names no key of the stage" if known else f"no stage is called {override.key[1]!r}",
        expected="stages.NAME.KEY=value, with NAME one of " + ", ".join(names),
        fix=f"write stages.{near}.KEY=value" if near else "choose one of these names",
    )


def _substitute(value: Any, key: Key, document: Document, known: Mapping[str, str], later: Iterable[str]) -> Any:
    """Replace `${name}` in all texts of a value. Raises ConfigError for an unknown name."""
    if isinstance(value, dict):
        return {name: _substitute(inner, (*key, name), document, known, later) for name, inner in value.items()}
    if isinstance(value, list):
        return [_substitute(inner, (*key, index), document, known, later) for index, inner in enumerate(value)]
    if not isinstance(value, str):
        return value

    def look_up(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in known:
            return known[name]
        near = nearest(name, known)
        raise ConfigError(
            document.where(key),
            f"${{{name}}} is {'not an earlier stage' if name in later else 'unknown'}",
            expected="one of " + ", ".join(f"${{{each}}}" for each in known),
            fix=f"write ${{{near}}}" if near else "name an earlier stage",
        )

    return _REFERENCE.sub(look_up, value)
