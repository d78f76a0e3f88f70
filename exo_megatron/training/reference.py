"""Reference log-probs: computed once and stored next to the run, or live before every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exo_megatron.config.sections import ComputeConfig
from exo_megatron.data.groups import Group
from exo_megatron.models.policy import PolicyModel
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import Topology
from exo_megatron.rollout.scoring import candidate_logprobs
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


@dataclass(frozen=True)
class StoredKey:
    """What stored log-probs belong to. Says nothing of the topology: it does not change them."""

    fingerprint: str
    data: str
    temperature: float
    precision: str


def read_stored(directory: Path, key: StoredKey, groups: Sequence[Group]) -> list[Group] | None:
    """Groups with the log-probs stored in `directory`, or None when there are none for this key."""
    path = directory / FILE
    if not path.exists():
        return None
    stored = read_json(path)
    if stored["key"] != vars(key):
        return None
    return [replace(group, reference_logprobs=tuple(row)) for group, row in zip(groups, stored["logps"], strict=True)]


def store_logprobs(
    directory: Path, key: StoredKey, reference: ReferenceModel, groups: Sequence[Group], runtime: Runtime
) -> list[Group]:
    """Compute the groups' reference log-probs and store them (rank 0 writes). Collective over the world."""
    progress = Progress("reference log-probs", len(groups), "groups", enabled=runtime.is_main)
    completed = reference.complete(groups, progress)
    progress.close()
    if runtime.is_main:
        write_json(directory / FILE, {"key": vars(key), "logps": [group.reference_logprobs for group in completed]})
    runtime.barrier()
    return completed
