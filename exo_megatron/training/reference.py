"""Reference log-probs: those of the data, computed once and stored next to the run, or live before every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exo_megatron.config.sections import ComputeConfig
from exo_megatron.data.groups import Group
from exo_megatron.data.logprob_source import LogprobSource
from exo_megatron.models.policy import PolicyModel
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import Topology
from exo_megatron.rollout.scoring import candidate_logprobs
from exo_megatron.training.identity import data_digest
from exo_megatron.utils.files import read_json, write_json
from exo_megatron.utils.progress import Progress

FILE = "reference_logprobs.json"


@dataclass(frozen=True)
class ReferenceModel:
    """A policy that is only read: its log-probs of candidates, at one temperature."""

    model: PolicyModel
    spec: ModelSpec
    topology: Topology
    compute: ComputeConfig
    temperature: float

    def complete(self, groups: Sequence[Group], progress: Progress | None = None) -> list[Group]:
        """The groups with `reference_logprobs`. Collective over the world; every rank gets all."""
        logps = candidate_logprobs(
            self.model,
            self.spec,
            self.topology,
            groups,
            self.compute,
            temperature=self.temperature,
            progress=progress,
        )
        return [replace(group, reference_logprobs=row) for group, row in zip(groups, logps, strict=True)]


def complete_groups(
    groups: Sequence[Group],
    output: Path,
    source: LogprobSource,
    load: Callable[[], ReferenceModel],
    runtime: Runtime,
) -> list[Group]:
    """All groups with reference log-probs; those that have none get them. Collective over the world.

    Computed ones are kept in `output` and found there by a run that goes on. load: called if some are to be computed.
    Rank 0 says in a line where they come from.
    """
    missing = [group for group in groups if group.reference_logprobs is None]
    origins = {"stored with the data": len(groups) - len(missing)}
    found: Sequence[Group] = ()
    if missing:
        kept = read_stored(output, source, missing)
        origins["computed by this run" if kept is None else "computed by this run earlier"] = len(missing)
        found = store_logprobs(output, source, load(), missing, runtime) if kept is None else kept
    if runtime.is_main:
        counts = ", ".join(f"{count} {origin}" for origin, count in origins.items() if count)
        print(f"reference log-probs of {len(groups)} groups: {counts}", flush=True)
    new = iter(found)
    return [next(new) if group.reference_logprobs is None else group for group in groups]


def read_stored(directory: Path, source: LogprobSource, groups: Sequence[Group]) -> list[Group] | None:
    """Groups with the log-probs stored in `directory`; None where there are none of this source for these groups."""
    path = directory / FILE
    if not path.exists():
        return None
    stored = read_json(path)
    if stored["key"] != _key(source, groups):
        return None
    return [replace(group, reference_logprobs=tuple(row)) for group, row in zip(groups, stored["logps"], strict=True)]


def store_logprobs(
    directory: Path, source: LogprobSource, reference: ReferenceModel, groups: Sequence[Group], runtime: Runtime
) -> list[Group]:
    """Compute the groups' reference log-probs and store them (rank 0 writes). Collective over the world."""
    progress = Progress("reference log-probs", len(groups), "groups", enabled=runtime.is_main)
    completed = reference.complete(groups, progress)
    progress.close()
    if runtime.is_main:
        write_json(
            directory / FILE, {"key": _key(source, groups), "logps": [group.reference_logprobs for group in completed]}
        )
    runtime.barrier()
    return completed


def _key(source: LogprobSource, groups: Sequence[Group]) -> dict[str, str | float]:
    """What stored log-probs belong to."""
    return {**vars(source), "data": data_digest(groups)}
