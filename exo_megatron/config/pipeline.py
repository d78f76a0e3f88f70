"""A `run` file: which stages, with which complete configurations, and which of them read the output of which."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exo_megatron.config.checks import paths, within
from exo_megatron.config.describe import nearest, section_class
from exo_megatron.config.document import COMMAND_LINE, Document, Key, Origin, dotted, dump_yaml, show
from exo_megatron.config.dump import config_digest
from exo_megatron.config.handover import find_disagreements
from exo_megatron.config.overrides import Override, apply_override
from exo_megatron.config.sections import Section
from exo_megatron.config.stages import STAGE_CONFIGS, PipelineStage, RunConfig, StageConfig
from exo_megatron.config.validate import validate, validate_partial, validate_stage
from exo_megatron.errors import ConfigError

_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_RESERVED_NAMES = ("output", ".", "..")


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a run, ready to be executed.

    upstream: names of the earlier stages whose output this one reads.
    digest: of the configuration and of the upstream stages' digests.
    """

    name: str
    stage: str
    config: StageConfig
    upstream: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class Pipeline:
    """A run: its output directory and its stages in order."""

    output: Path
    seed: int
    stages: tuple[PlannedStage, ...]

    def render(self) -> str:
        """The run as YAML with complete stage configurations; loads as an equal run."""
        stages = [
            {"name": each.name, "stage": each.stage, "config": each.config.model_dump(mode="json")}
            for each in self.stages
        ]
        return dump_yaml({"output": str(self.output), "seed": self.seed, "stages": stages})

    def downstream(self, name: str) -> tuple[PlannedStage, ...]:
        """The stages that read the output of `name`, directly or through others."""
        affected = {name}
        for each in self.stages:
            if affected.intersection(each.upstream):
                affected.add(each.name)
        return tuple(each for each in self.stages if each.name in affected and each.name != name)


def plan_pipeline(document: Document, overrides: Sequence[Override]) -> Pipeline:
    """Merge defaults, fill in outputs, seeds and `${...}`, and check every stage. Raises ConfigError for any flaw."""
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
    return Pipeline(run.output, run.seed, tuple(planned))


def _plan_stage(entry: PipelineStage, document: Document, run: RunConfig, earlier: list[PlannedStage]) -> PlannedStage:
    document.data.setdefault("output", str(run.output / entry.name))
    document.data.setdefault("seed", run.seed)
    known = {"output": str(run.output), **{each.name: str(each.config.output) for each in earlier}}
    later = [each.name for each in run.stages if each.name not in known]
    document.data = _substitute(document.data, (), document, known, later)
    config = validate_stage(STAGE_CONFIGS[entry.stage], document)
    _check_output(config, document, run, earlier)
    for flaw in find_disagreements(config, [each.config for each in earlier]):
        raise ConfigError(document.where(flaw.key), flaw.problem, expected=flaw.expected, fix=flaw.fix)
    upstream = {each.name: each.digest for each in earlier if _reads(config, each.config.output)}
    return PlannedStage(entry.name, entry.stage, config, tuple(upstream), config_digest(config, upstream))


def _check_output(config: StageConfig, document: Document, run: RunConfig, earlier: list[PlannedStage]) -> None:
    """A stage's directory must not hold another's, because it is moved away when the stage has to start anew."""
    others = {"the run": run.output, **{f"stage {each.name}": each.config.output for each in earlier}}
    for owner, other in others.items():
        if within(other, config.output):
            raise ConfigError(
                document.where(("output",)),
                f"got {show(str(config.output))}, which is or holds the output of {owner}",
                expected="a directory of its own for every stage",
                fix="choose another output",
            )


def _reads(config: StageConfig, output: Path) -> bool:
    """Whether a path of the configuration is `output` or lies below it."""
    return any(within(path, output) for _, path in paths(config))


def _stage_document(index: int, entry: PipelineStage, document: Document) -> Document:
    """The stage's own configuration over the defaults of the sections that its class has."""
    fields = STAGE_CONFIGS[entry.stage].model_fields
    own: Key = ("stages", index, "config")
    shown = f"stages.{entry.name}"
    entry_origin = document.origins[("stages", index)]
    merged = Document({}, {(): Origin(entry_origin.source, shown)})
    for name, value in document.data.get("defaults", {}).items():
        if name in fields and section_class(fields[name].annotation) is not None:
            inner = {key[2:]: origin for key, origin in document.origins.items() if key[:2] == ("defaults", name)}
            merged.put((name,), deepcopy(value), inner)
    for key, origin in document.origins.items():
        if key[:3] == own:
            merged.origins[key[3:]] = Origin(origin.source, ".".join([shown, *map(str, key[3:])]))
    _merge(merged.data, deepcopy(entry.config))
    return merged


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> None:
    """Put `top` over `base` in place: mappings entry by entry, everything else as a whole."""
    for name, value in top.items():
        inner = base.get(name)
        if isinstance(inner, dict) and isinstance(value, dict):
            _merge(inner, value)
        else:
            base[name] = value


def _check_names(stages: Sequence[PipelineStage], document: Document) -> None:
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
    """Every default must be a section of some stage, with keys and values that the section accepts."""
    sections: dict[str, type[Section]] = {}
    for config in STAGE_CONFIGS.values():
        found = {name: section_class(info.annotation) for name, info in config.model_fields.items()}
        sections.update({name: section for name, section in found.items() if section is not None})
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


def _find_stage(override: Override, stages: Sequence[PipelineStage]) -> tuple[int, Key]:
    """The stage that `stages.NAME.KEY` means, and KEY. Names may hold dots: the longest one that fits is meant."""
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
    """Replace `${name}` in all texts."""
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
