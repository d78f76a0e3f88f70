"""Preference pairs made of rewarded candidates, and ties, in which neither candidate is preferred."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from exo_megatron.config.losses import LOSSES, LossSpec, kinds_comparing
from exo_megatron.config.stages import PairRule
from exo_megatron.data.groups import Group
from exo_megatron.data.records import SourceRecord
from exo_megatron.errors import DataError, EqualRewards, EqualTexts

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
        EqualRewards: all rewards are equal.
    """
    chosen, rejected = (extreme(range(len(rewards)), key=rewards.__getitem__) for extreme in (max, min))
    if rewards[chosen] == rewards[rejected]:
        which = "the first two" if rule == "two_draws" else "all"
        more = "set pairs=best_and_worst to choose among all candidates, " if rule == "two_draws" else ""
        raise EqualRewards(
            record.where,
            f"{which} candidates of record {record.id!r} have reward {rewards[chosen]}, so none is preferred",
            expected="different rewards for a preference loss",
            fix=f"{LEAVE_OUT}, {more}or use a loss.kind for which equal rewards are legitimate: "
            f"{kinds_comparing('rewards')}",
        )
    return chosen, rejected


def has_several(rejected: object) -> bool:
    """Tell whether "rejected" is a list of answers, not one answer (a string, or messages)."""
    return isinstance(rejected, list) and not all(isinstance(each, Mapping) for each in rejected)


def check_number(where: str, count: int, loss: LossSpec | None, most: int | None) -> None:
    """Check the number of answers of a preference, the chosen one included.

    Args:
        where: the place of the record, for messages.
        count: their number.
        loss: the loss that compares them, or None for any.
        most: the setting `candidates`.

    Raises:
        DataError: there are more than the loss compares, or than `candidates` lets in.
    """
    if count > 2 and loss is not None and not loss.several_rejected:
        raise DataError(
            where,
            f"has {count - 1} rejected answers, and the loss compares a pair",
            expected="one rejected answer",
            fix=f"use loss.kind {' or '.join(k for k, spec in LOSSES.items() if spec.several_rejected)}, which take "
            "several, or write one record per pair",
        )
    if most is not None and count > most:
        raise DataError(
            where,
            f"has {count} answers, and candidates is {most}",
            expected=f"at most {most}: no rejected answer is left out without being told",
            fix="remove the setting candidates",
        )


def check_different(record: SourceRecord, group: Group) -> None:
    """Raise EqualTexts if the chosen candidate and a rejected one are the same text."""
    chosen, *rejected = group.candidates
    if chosen in rejected:
        raise EqualTexts(
            record.where,
            f"chosen and rejected of record {record.id!r} are the same text",
            expected="two different completions",
            fix=f"{LEAVE_OUT}, or remove the record",
        )
