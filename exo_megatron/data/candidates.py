"""The stored candidates of `rollout` and `score`: one JSON record per prompt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exo_megatron.data.logprob_source import LogprobSource, parse_source
from exo_megatron.data.records import (
    SourceRecord,
    boolean,
    finite_number,
    finite_numbers,
    object_list,
    text,
    token_ids,
    wrong_type,
)
from exo_megatron.errors import DataError
from exo_megatron.utils.files import write_jsonl

CANDIDATES_FILE = "candidates.jsonl"
ROLLOUT_FILE = "rollout.json"
"""Description of the rollout that drew the candidates beside it."""


@dataclass(frozen=True)
class Candidate:
    """One sampled candidate.

    Attributes:
        text: its text.
        token_ids: R >= 1 ids as sampled, never re-encoded.
        finished: whether it ended by itself, so that the last id is end-of-sequence.
        logprob: sum over all its tokens, in nats, under softmax(logits / temperature) of the policy
            that drew it, without any truncation of that distribution.
        logprob_digest: digest of the record's source and of the ids that the log-prob belongs to
            (see LogprobSource.digest).
    """

    text: str
    token_ids: tuple[int, ...]
    finished: bool
    logprob: float | None = None
    logprob_digest: str | None = None


@dataclass(frozen=True)
class CandidateRecord:
    """One prompt, its K >= 1 candidates and, once scored, their K rewards.

    `logprob_source` describes the forward pass of training that computed the log-probs; every
    candidate then has one with its digest. It is None if the log-probs, if any, came from
    elsewhere, and then no run uses them.
    """

    id: str
    prompt: str
    prompt_ids: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    rewards: tuple[float, ...] | None = None
    logprob_source: LogprobSource | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The K texts that a reward source reads."""
        return tuple(candidate.text for candidate in self.candidates)

    @property
    def logprobs(self) -> tuple[float, ...]:
        """The K log-probs, for a record that has a `logprob_source`."""
        return tuple(candidate.logprob for candidate in self.candidates if candidate.logprob is not None)


def write_candidates(path: Path, records: Iterable[CandidateRecord]) -> None:
    """Write records to the file `path` atomically.

    Raises ValueError for log-probs and rewards that are not finite.
    """
    write_jsonl(path, map(_stored, records))


def parse_candidate_record(record: SourceRecord) -> CandidateRecord:
    """Check one stored record and convert it to its types.

    Raises DataError with the record's file and line.
    """
    where, fields = record.where, record.fields
    source = _parse_source(where, fields)
    candidates = tuple(
        _parse_candidate(f"{where} candidates[{k}]", item, sourced=source is not None)
        for k, item in enumerate(object_list(where, fields, "candidates"))
    )
    rewards = finite_numbers(where, fields, "rewards") if "rewards" in fields else None
    if rewards is not None and len(rewards) != len(candidates):
        raise DataError(
            where,
            f"has {len(rewards)} rewards for {len(candidates)} candidates",
            expected="one reward per candidate",
            fix="run `exo-megatron score` on the rollout again",
        )
    return CandidateRecord(
        id=record.id,
        prompt=text(where, fields, "prompt"),
        prompt_ids=token_ids(where, fields, "prompt_ids"),
        candidates=candidates,
        rewards=rewards,
        logprob_source=source,
    )


def _parse_source(where: str, fields: Mapping[str, Any]) -> LogprobSource | None:
    if "logprob_source" not in fields:
        return None
    stored = fields["logprob_source"]
    if not isinstance(stored, Mapping):
        raise wrong_type(where, "logprob_source", stored, "an object with fingerprint, temperature and precision")
    return parse_source(f"{where} logprob_source", stored)


def _parse_candidate(where: str, fields: Mapping[str, Any], *, sourced: bool) -> Candidate:
    """Parse one candidate. It must have a log-prob with its digest if `sourced`."""
    known = _known(fields)
    if sourced and not {"logprob", "logprob_digest"} <= known.keys():
        raise DataError(
            where,
            "has not both 'logprob' and 'logprob_digest', but its record has 'logprob_source'",
            expected="both for every candidate, as `exo-megatron rollout` writes them",
            fix="remove 'logprob_source' from the record: `align` then computes what it needs",
        )
    return Candidate(
        text=text(where, fields, "text"),
        token_ids=token_ids(where, fields, "token_ids"),
        finished=boolean(where, fields, "finished"),
        logprob=finite_number(where, known, "logprob") if "logprob" in known else None,
        logprob_digest=text(where, known, "logprob_digest") if sourced else None,
    )


def _stored(record: CandidateRecord) -> dict[str, Any]:
    """Convert the record to JSON values. Unknown values are absent, not null."""
    logprobs = [candidate.logprob for candidate in record.candidates if candidate.logprob is not None]
    if not all(map(math.isfinite, (*logprobs, *(record.rewards or ())))):
        raise ValueError(f"record {record.id!r} has a log-prob or reward that is not finite")
    stored = _known(asdict(record))
    stored["candidates"] = [_known(candidate) for candidate in stored["candidates"]]
    return stored


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Remove nulls, which columnar data sets use for absent values."""
    return {name: value for name, value in fields.items() if value is not None}
