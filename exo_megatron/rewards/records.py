"""Rewards for stored candidates, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from exo_megatron.data.completions import ScorableRecord
from exo_megatron.errors import RewardError
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.rewards.source import RewardSource
from exo_megatron.utils.progress import Progress

Record = TypeVar("Record", bound=ScorableRecord)


def score_records(
    records: Sequence[Record],
    source: RewardSource,
    runtime: Runtime,
    *,
    batch_size: int,
    label: str | None = None,
) -> list[Record] | None:
    """Score all candidates of the records. Collective over the world.

    Every rank passes all records and scores a consecutive share of them.

    Args:
        records: the same on every rank.
        source: the reward source of this rank.
        runtime: the processes of the world.
        batch_size: candidates that are scored at once.
        label: label of a progress line on rank 0; None for no line.

    Returns:
        The records with rewards, in order, on rank 0 of the world; None on the others.

    Raises:
        RewardError: a reward is not finite.
    """
    begin, end = (len(records) * rank // runtime.world_size for rank in (runtime.rank, runtime.rank + 1))
    share = records[begin:end]
    completions = sum(len(record.texts) for record in share)
    with Progress(label or "", completions, "completions", enabled=runtime.is_main and label is not None) as progress:
        scored = score_share(share, source, batch_size=batch_size, progress=progress)
    return runtime.gather_items(scored)


def score_share(
    records: Sequence[Record], source: RewardSource, *, batch_size: int, progress: Progress
) -> list[Record]:
    """Score the candidates of the records in this process alone. Returns records with rewards."""
    pairs = [(record, k) for record in records for k in range(len(record.texts))]
    rewards: list[float] = []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        found = source.score([r.prompt for r, _ in batch], [r.texts[k] for r, k in batch])
        for (record, k), reward in zip(batch, found, strict=True):
            check_finite(reward, record, k)
        rewards += found
        progress.advance(len(batch))
    scored = []
    for record in records:
        count = len(record.texts)
        scored.append(replace(record, rewards=tuple(rewards[:count])))
        del rewards[:count]
    return scored


def check_finite(reward: float, record: ScorableRecord, k: int) -> None:
    """Raise RewardError, which names record, candidate and value, for NaN and infinities."""
    if not math.isfinite(reward):
        raise RewardError(
            f"record {record.id!r}, candidate {k}",
            f"the reward is {reward}",
            expected="a finite number",
            fix="correct the reward source, or remove the record",
        )
