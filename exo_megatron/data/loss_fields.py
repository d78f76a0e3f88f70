"""Fields of records that only some losses read: importance weights, and log-probs of single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from exo_megatron.config.losses import LossSpec
from exo_megatron.data.groups import Group
from exo_megatron.data.records import SourceRecord, finite_number_lists, finite_numbers
from exo_megatron.errors import DataError

TOKEN_LOGPROBS = ("reference_token_logprobs", "behaviour_token_logprobs")
"""Fields of a record, and of Group, with log-probs of single tokens."""


def read_loss_fields(record: SourceRecord, group: Group, loss: LossSpec, numbers: Sequence[int], size: int) -> Group:
    """Return the group with the values that the loss needs: one per candidate, or one per token.

    The group's candidates are those with these numbers of the `size` that the record has. Raises
    DataError for bad values and for another number of them.
    """
    where, fields = record.where, record.fields
    if loss.log_weights:
        weights = finite_numbers(where, fields, "log_weights")
        _check_length(where, "log_weights", len(weights), size)
        group = replace(group, log_weights=tuple(weights[k] for k in numbers))
    if loss.token_logps:
        reference, behaviour = (_token_logprobs(record, group, name, numbers, size) for name in TOKEN_LOGPROBS)
        group = replace(group, reference_token_logprobs=reference, behaviour_token_logprobs=behaviour)
    return group


def _token_logprobs(
    record: SourceRecord, group: Group, name: str, numbers: Sequence[int], size: int
) -> tuple[tuple[float, ...], ...] | None:
    """Read the log-probs of every token of the group's candidates; None if the record has none."""
    if name not in record.fields:
        return None
    values = finite_number_lists(record.where, record.fields, name)
    _check_length(record.where, name, len(values), size)
    for k, candidate in zip(numbers, group.candidates, strict=True):
        _check_length(record.where, f"{name}[{k}]", len(values[k]), len(candidate))
    return tuple(values[k] for k in numbers)


def _check_length(where: str, name: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise DataError(where, f"{name!r} has {found} values", expected=f"{wanted}", fix="correct the record")
