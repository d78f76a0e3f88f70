"""Reference log-probs: from the data, computed once and stored, or live before every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from exo_megatron.data.groups import Group, data_digest
from exo_megatron.data.logprob_source import LogprobSource
from exo_megatron.execution.forward import candidate_logprobs
from exo_megatron.execution.policy import Policy
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.utils.files import read_json, write_json
from exo_megatron.utils.progress import Progress

REFERENCE_FILE = "reference_logprobs.json"


CompleteGroups = Callable[[Sequence[Group], Progress], Sequence[Group]]
"""Function that gives groups reference log-probs; the progress counts groups.

Collective over the world.
"""


def add_logprobs(
    policy: Policy, groups: Sequence[Group], progress: Progress | None = None, *, temperature: float
) -> list[Group]:
    """Return groups with the reference log-probs that a policy computes.

    Collective over the world; every rank passes all groups and gets all of them.
    """
    logps = candidate_logprobs(policy, groups, temperature=temperature, progress=progress)
    return [replace(group, reference_logprobs=values) for group, values in zip(groups, logps, strict=True)]


def complete_groups(
    groups: Sequence[Group],
    output: Path,
    source: LogprobSource,
    load: Callable[[], CompleteGroups],
    runtime: Runtime,
) -> list[Group]:
    """Give reference log-probs to the groups that have none. Collective over the world.

    Rank 0 prints a line that says where they come from.

    Args:
        groups: all groups of the run.
        output: directory in which computed log-probs are kept and from which a resumed run reads
            them.
        source: the reference, temperature and precision that the log-probs belong to.
        load: called if some are to be computed; returns the function that computes them.
        runtime: the world.
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
    """Read the log-probs stored in `directory`; None if none are of this source and groups."""
    path = directory / REFERENCE_FILE
    if not path.exists():
        return None
    stored = read_json(path)
    if stored["key"] != _key(source, groups):
        return None
    return [
        replace(group, reference_logprobs=tuple(values)) for group, values in zip(groups, stored["logps"], strict=True)
    ]


def store_logprobs(
    directory: Path, source: LogprobSource, complete: CompleteGroups, groups: Sequence[Group], runtime: Runtime
) -> Sequence[Group]:
    """Compute the groups' reference log-probs and store them (rank 0 writes).

    Collective over the world.
    """
    progress = Progress("reference log-probs", len(groups), "groups", enabled=runtime.is_main)
    completed = complete(groups, progress)
    progress.close()
    if runtime.is_main:
        write_json(
            directory / REFERENCE_FILE,
            {"key": _key(source, groups), "logps": [group.reference_logprobs for group in completed]},
        )
    runtime.barrier()
    return completed


def _key(source: LogprobSource, groups: Sequence[Group]) -> dict[str, str | float]:
    """Describe what stored log-probs belong to."""
    return {**vars(source), "data": data_digest(groups)}
