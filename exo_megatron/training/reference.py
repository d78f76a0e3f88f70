"""Reference log-probs: from the data, computed once and stored, or live before every step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from exo_megatron.data.groups import Group, data_digest
from exo_megatron.data.logprob_source import LogprobSource
from exo_megatron.data.packing import WINDOW
from exo_megatron.data.prepared import PreparedGroups
from exo_megatron.errors import DataError
from exo_megatron.execution.forward import candidate_logprobs
from exo_megatron.execution.policy import Policy
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.utils.files import read_json, write_json
from exo_megatron.utils.progress import Progress

REFERENCE_FILE = "reference_logprobs.json"


Logprobs: TypeAlias = list[Sequence[float]]
"""The K log-probs of each of several groups."""

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
    groups: PreparedGroups,
    output: Path,
    source: LogprobSource,
    load: Callable[[], CompleteGroups],
    runtime: Runtime,
) -> PreparedGroups:
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
    missing = groups.lacking_logprobs()
    origins = {"stored with the data": len(groups) - len(missing)}
    if missing:
        key = _key(source, groups, missing)
        kept = _read_stored(output, key, runtime)
        origins["computed by this run" if kept is None else "computed by this run earlier"] = len(missing)
        found = _store_logprobs(output, key, load(), groups, missing, runtime) if kept is None else kept
        groups = groups.with_logprobs(missing, found)
    if runtime.is_main:
        counts = ", ".join(f"{count} {origin}" for origin, count in origins.items() if count)
        print(f"reference log-probs of {len(groups)} groups: {counts}", flush=True)
    return groups


def _read_stored(directory: Path, key: Mapping[str, str | float], runtime: Runtime) -> Logprobs | None:
    """Read the log-probs stored in `directory`; None if none belong to this key, or the file is damaged."""
    path = directory / REFERENCE_FILE
    if not path.exists():
        return None
    try:
        stored = read_json(path)
        logprobs: Logprobs = stored["logps"]
        if stored["sha256"] == _checksum(stored["key"], logprobs):
            return logprobs if stored["key"] == key else None
    except (DataError, KeyError, TypeError):
        pass
    if runtime.is_main:
        print(f"warning: {path} is damaged, so its log-probs are computed again", flush=True)
    return None


def _checksum(key: object, logprobs: object) -> str:
    return hashlib.sha256(json.dumps([key, logprobs], sort_keys=True).encode()).hexdigest()


def _store_logprobs(
    directory: Path,
    key: Mapping[str, str | float],
    complete: CompleteGroups,
    groups: PreparedGroups,
    numbers: Sequence[int],
    runtime: Runtime,
) -> Logprobs:
    """Compute the reference log-probs of the groups with these numbers and store them (rank 0 writes).

    Collective over the world. Only the groups of one window are in memory at a time.
    """
    found: Logprobs = []
    with Progress("reference log-probs", len(numbers), "groups", enabled=runtime.is_main) as progress:
        for start in range(0, len(numbers), WINDOW):
            window = complete([groups[number] for number in numbers[start : start + WINDOW]], progress)
            found += [group.reference_logprobs or () for group in window]
    if runtime.is_main:
        stored = {"key": key, "logps": found, "sha256": _checksum(key, found)}
        write_json(directory / REFERENCE_FILE, stored)
    runtime.barrier()
    return found


def _key(source: LogprobSource, groups: PreparedGroups, numbers: Sequence[int]) -> dict[str, str | float]:
    """Describe what stored log-probs of the groups with these numbers belong to."""
    whole = len(numbers) == len(groups)
    return {**vars(source), "data": groups.digest if whole else data_digest(groups[number] for number in numbers)}
