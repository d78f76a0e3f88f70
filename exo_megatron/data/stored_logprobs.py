"""Stored log-probs of the data as reference log-probs of a run.

They are used only if model, temperature, precision and token ids are the same; otherwise they are
an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from exo_megatron.data.candidates import CandidateRecord
from exo_megatron.data.logprob_source import DIGEST_LENGTH, LogprobSource
from exo_megatron.errors import DataError


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


def reference_logprobs(where: str, record: CandidateRecord, wanted: WantedLogprobs) -> tuple[float, ...] | None:
    """Return the record's K log-probs; None if it has none.

    Raises DataError at `where` if they belong to other token ids, another model, temperature or
    precision. It names every difference.
    """
    if record.logprob_source is None:
        return None
    differences = [*_of_data(record, record.logprob_source), *_of_source(record.logprob_source, wanted)]
    if differences:
        raise DataError(
            where,
            f"the stored log-probs of record {record.id!r} are of {_listed(d.found for d in differences)}",
            expected=_listed(d.wanted for d in differences),
            fix=f"{', '.join(d.fix for d in differences)}, or set reference_logprobs=computed to compute them anew",
        )
    return record.logprobs


def _of_data(record: CandidateRecord, source: LogprobSource) -> Iterator[_Difference]:
    digests = [source.digest(record.prompt_ids, candidate.token_ids) for candidate in record.candidates]
    changed = [k for k, digest in enumerate(digests) if digest != record.candidates[k].logprob_digest]
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


def _listed(parts: Iterator[str]) -> str:
    return ", ".join(parts)
