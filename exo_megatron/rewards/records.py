"""Rewards for stored candidates, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeVar

from exo_megatron.data.candidates import CandidateRecord
from exo_megatron.data.completions import ScorableRecord
from exo_megatron.errors import RewardError
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.rewards.source import Completion, RewardSource, SampledIds
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
        scored = score_share(share, source, names=column_names(records), batch_size=batch_size, progress=progress)
    return runtime.gather_items(scored)


def score_share(
    records: Sequence[Record], source: RewardSource, *, names: Sequence[str], batch_size: int, progress: Progress
) -> list[Record]:
    """Score the candidates of the records in this process alone. Returns records with rewards.

    `names` are the columns that the reward source gets.
    """
    judged = completions_of(records, names)
    rewards: list[float] = []
    while batch := list(islice(judged, batch_size)):
        found = source.score(batch)
        for completion, reward in zip(batch, found, strict=True):
            check_finite(reward, completion.where)
        rewards += found
        progress.advance(len(batch))
    scored = []
    for record in records:
        count = len(record.texts)
        scored.append(replace(record, rewards=tuple(rewards[:count])))
        del rewards[:count]
    return scored


def column_names(records: Iterable[ScorableRecord]) -> list[str]:
    """List the columns that any of the records has, in order of appearance."""
    return list(dict.fromkeys(name for record in records for name in record.columns))


def completions_of(records: Iterable[ScorableRecord], names: Sequence[str]) -> Iterator[Completion]:
    """Yield all candidates of the records as a reward source judges them, with the columns `names`."""
    for record in records:
        columns = {name: record.columns.get(name) for name in names}
        for k, (text, answer) in enumerate(zip(record.texts, record.answers, strict=True)):
            chat = None if record.chat is None else record.chat.followed_by(answer)
            where = f"record {record.id!r}, candidate {k}"
            yield Completion(where, record.prompt_text, text, chat, columns, _sampled(record, k))


def _sampled(record: ScorableRecord, k: int) -> SampledIds | None:
    if not isinstance(record, CandidateRecord):
        return None
    candidate = record.candidates[k]
    return SampledIds(record.prompt_ids, candidate.token_ids, candidate.finished)


def check_finite(reward: float, where: str) -> None:
    """Raise RewardError, which names record, candidate and value, for NaN and infinities."""
    if not math.isfinite(reward):
        raise RewardError(
            where,
            f"the reward is {reward}",
            expected="a finite number",
            fix="correct the reward source, or remove the record",
        )
