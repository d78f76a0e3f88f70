"""Preference pairs made of rewarded candidates, and ties, in which neither candidate is preferred."""

from __future__ import annotations

from collections.abc import Sequence

from exo_megatron.config.losses import kinds_comparing
from exo_megatron.config.stages import PairRule
from exo_megatron.data.groups import Group
from exo_megatron.data.records import SourceRecord
from exo_megatron.errors import TieError

LEAVE_OUT = "set ties=skip to leave such records out"


def choose_pair(record: SourceRecord, rewards: Sequence[float], rule: PairRule) -> tuple[int, int]:
    """Choose the candidates with the highest and the lowest reward, the first of equals.

    Args:
        record: the record of the candidates, for messages.
        rewards: rewards of the candidates to choose among: of the first two for two draws.
        rule: the rule that these candidates follow, for messages.

    Returns:
        The numbers of the chosen and the rejected candidate.

    Raises:
        TieError: all rewards are equal.
    """
    chosen, rejected = (extreme(range(len(rewards)), key=rewards.__getitem__) for extreme in (max, min))
    if rewards[chosen] == rewards[rejected]:
        which = "the first two" if rule == "two_draws" else "all"
        more = "set pairs=best_and_worst to choose among all candidates, " if rule == "two_draws" else ""
        raise TieError(
            record.where,
            f"{which} candidates of record {record.id!r} have reward {rewards[chosen]}, so none is preferred",
            expected="different rewards for a preference loss",
            fix=f"{LEAVE_OUT}, {more}or use a loss.kind for which equal rewards are legitimate: "
            f"{kinds_comparing('rewards')}",
        )
    return chosen, rejected


def check_different(record: SourceRecord, pair: Group) -> None:
    """Raise TieError if the two candidates of a pair are the same text."""
    chosen, rejected = pair.candidates
    if chosen == rejected:
        raise TieError(
            record.where,
            f"chosen and rejected of record {record.id!r} are the same text",
            expected="two different completions",
            fix=f"{LEAVE_OUT}, or remove the record",
        )
