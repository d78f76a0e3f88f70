"""Digests that say whether two runs are the same work."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from pydantic import BaseModel

from exo_megatron.data.groups import Group


def data_digest(groups: Sequence[Group]) -> str:
    """SHA-256 over ids, token ids and rewards of the groups, in order."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update(repr((group.id, group.prompt, group.candidates, group.rewards)).encode())
    return digest.hexdigest()


def run_identity(data: str, fingerprint: str, seed: int, precision: str, *sections: BaseModel) -> str:
    """SHA-256 over the data, the starting weights, the seed and the settings that decide the result.

    data: the `data_digest` of the groups. Topology, recomputation and packing are not among the settings: a run may
    go on with others.
    """
    settings = [section.model_dump_json() for section in sections]
    parts = [data, fingerprint, str(seed), precision, *settings]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
