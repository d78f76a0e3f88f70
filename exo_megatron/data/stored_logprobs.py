"""Stored log-probs of the data as reference log-probs of a run.

They are used only if model, temperature, precision and token ids are the same; otherwise they are
an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exo_megatron.data.candidates import ROLLOUT_FILE, CandidateRecord
from exo_megatron.data.logprob_source import DIGEST_LENGTH, LogprobSource
from exo_megatron.data.shards import output_of
from exo_megatron.errors import DataError, StoredLogprobsError
from exo_megatron.utils.files import read_json


@dataclass(frozen=True)
class WantedLogprobs:
    """The reference log-probs that a run needs. `checkpoint` is the model's path, for messages."""

    source: LogprobSource
    checkpoint: Path


@dataclass(frozen=True)
class _Difference:
    found: str
    wanted: str
    fix: str


def reference_logprobs(
    where: str, record: CandidateRecord, numbers: Sequence[int], wanted: WantedLogprobs
) -> tuple[float, ...] | None:
    """Return the log-probs of the record's candidates with these numbers; None if it has none.

    Raises StoredLogprobsError at `where` if they belong to other token ids, another model, temperature or
    precision. It names every difference.
    """
    if record.logprob_source is None:
        return None
    differences = [*_of_data(record, numbers, record.logprob_source), *_of_source(record.logprob_source, wanted)]
    if differences:
        raise StoredLogprobsError(
            where,
            f"the stored log-probs of record {record.id!r} are of {_listed(d.found for d in differences)}",
            expected=_listed(d.wanted for d in differences),
            fix=f"{', '.join(d.fix for d in differences)}, or set reference_logprobs=computed to compute them anew",
        )
    return tuple(record.logprobs[k] for k in numbers)


def _of_data(record: CandidateRecord, numbers: Sequence[int], source: LogprobSource) -> Iterator[_Difference]:
    candidates = {k: record.candidates[k] for k in numbers}
    changed = [
        k for k, each in candidates.items() if each.logprob_digest != source.digest(record.prompt_ids, each.token_ids)
    ]
    if changed:
        names = ", ".join(f"candidates[{k}]" for k in changed)
        yield _Difference(
            f"other data (token ids of prompt or {names} were changed, or came from elsewhere)",
            "the token ids that they were computed for",
            "restore the record",
        )


def _of_source(source: LogprobSource, wanted: WantedLogprobs) -> Iterator[_Difference]:
    here = wanted.source
    if source.fingerprint != here.fingerprint:
        yield _Difference(
            f"the model with fingerprint {source.fingerprint[:DIGEST_LENGTH]}",
            f"the reference {wanted.checkpoint} with fingerprint {here.fingerprint[:DIGEST_LENGTH]}",
            "set reference.checkpoint to the checkpoint of the rollout",
        )
    if source.temperature != here.temperature:
        yield _Difference(
            f"temperature {source.temperature}",
            f"temperature {here.temperature}",
            f"set loss.temperature={source.temperature}",
        )
    if source.precision != here.precision:
        yield _Difference(
            f"precision {source.precision}",
            f"precision {here.precision}",
            f"set compute.precision={source.precision}",
        )


def describe_temperatures(records: Mapping[float | None, int], path: Path, wanted: float) -> str | None:
    """Describe in a line which records of candidates were drawn at another temperature than `wanted`.

    Args:
        records: numbers of records by the temperature of their own "logprob_source"; of those without
            one, under None, the rollout.json beside the data tells it.
        path: the file that they are from, or its directory, or the output of a stage.
        wanted: the temperature of the loss.

    Returns:
        The line, or None if there is nothing to say.
    """
    beside = _rollout_temperature(output_of(path))
    drawn: Counter[float | None] = Counter()
    for temperature, number in records.items():
        drawn[beside if temperature is None else temperature] += number
    others = Counter({each: number for each, number in drawn.items() if each not in (None, wanted)})
    if not others:
        return None
    temperatures = sorted(temperature for temperature in others if temperature is not None)
    change = f"set loss.temperature={temperatures[0]}, or " if len(drawn) == 1 else ""
    return (
        f"{others.total()} of {drawn.total()} records were drawn at temperature "
        f"{' or '.join(map(str, temperatures))}, but "
        f"loss.temperature is {wanted}: their candidates are not draws of the reference that the loss compares with, "
        "which the paper's theorems assume, and stored log-probs are not used; to make them agree, "
        f"{change}draw candidates with sampling.temperature={wanted}"
    )


def _rollout_temperature(directory: Path) -> float | None:
    """Read the temperature in a directory's rollout.json; None for a missing or damaged file."""
    try:
        described = read_json(directory / ROLLOUT_FILE)
    except DataError:
        return None
    temperature = described.get("temperature") if isinstance(described, dict) else None
    return temperature if isinstance(temperature, int | float) else None


def _listed(parts: Iterator[str]) -> str:
    return ", ".join(parts)
