"""Rewards for stored candidates, over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, islice, pairwise
from typing import TypeVar

from exo_megatron.data.candidates import CandidateRecord
from exo_megatron.data.completions import ScorableRecord
from exo_megatron.data.records import LARGEST_NUMBER
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
    names: Sequence[str],
    batch_size: int,
    progress: Progress | None = None,
) -> list[Record] | None:
    """Score all candidates of the records. Collective over the world.

    Every rank passes all records and scores a consecutive part of their candidates.

    Args:
        records: the same on every rank.
        source: the reward source of this rank.
        runtime: the processes of the world.
        names: the columns that the reward source gets.
        batch_size: candidates that are scored at once.
        progress: counts the candidates of this rank.

    Returns:
        The records with rewards, in order, on rank 0 of the world; None on the others.

    Raises:
        RewardError: a reward is not finite.
    """
    part = own_part(sum(len(record.texts) for record in records), runtime)
    judged = islice(completions_of(records, names), part.start, part.stop)
    rewards = runtime.gather_items(_judge(judged, source, batch_size, progress))
    return None if rewards is None else _with_rewards(records, rewards)


def own_part(candidates: int, runtime: Runtime) -> range:
    """Return the numbers of the candidates, of so many, that this rank scores where all ranks share them."""
    begin, end = (candidates * rank // runtime.world_size for rank in (runtime.rank, runtime.rank + 1))
    return range(begin, end)


def score_share(
    records: Sequence[Record],
    source: RewardSource,
    *,
    names: Sequence[str],
    batch_size: int,
    progress: Progress | None = None,
) -> list[Record]:
    """Score the candidates of the records in this process alone. Returns records with rewards.

    `names` are the columns that the reward source gets.
    """
    return _with_rewards(records, _judge(completions_of(records, names), source, batch_size, progress))


def _judge(
    completions: Iterator[Completion], source: RewardSource, batch_size: int, progress: Progress | None
) -> list[float]:
    """Return the rewards of completions, which are finite."""
    rewards: list[float] = []
    while batch := list(islice(completions, batch_size)):
        found = source.score(batch)
        for completion, reward in zip(batch, found, strict=True):
            check_finite(reward, completion.where)
        rewards += found
        if progress is not None:
            progress.advance(len(batch))
    return rewards


def _with_rewards(records: Sequence[Record], rewards: Sequence[float]) -> list[Record]:
    ends = accumulate((len(record.texts) for record in records), initial=0)
    return [
        replace(record, rewards=tuple(rewards[start:stop]))
        for record, (start, stop) in zip(records, pairwise(ends), strict=True)
    ]


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
    """Raise RewardError, which names record, candidate and value, for NaN and numbers without bounds."""
    if not abs(reward) <= LARGEST_NUMBER:
        raise RewardError(
            where,
            f"the reward is {reward}",
            expected=f"a number from {-LARGEST_NUMBER:g} to {LARGEST_NUMBER:g}",
            fix="correct the reward source, or remove the record",
        )
