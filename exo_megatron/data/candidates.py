"""The stored candidates of `rollout` and `score`: one JSON record per prompt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exo_megatron.data.fields import boolean, finite_number, finite_numbers, object_list, text, token_ids
from exo_megatron.data.records import SourceRecord, read_jsonl_records
from exo_megatron.errors import DataError
from exo_megatron.utils.files import write_jsonl

CANDIDATES_FILE = "candidates.jsonl"
ROLLOUT_FILE = "rollout.json"
"""How the candidates beside it were drawn."""


@dataclass(frozen=True)
class Candidate:
    """One sampled completion.

    token_ids: R >= 1 ids as sampled, never re-encoded. finished: it ended by itself, so the last id is
    end-of-sequence. logprob: sum over all its tokens, in nats, under softmax(logits / temperature) of the policy
    that drew it.
    """

    text: str
    token_ids: tuple[int, ...]
    finished: bool
    logprob: float


@dataclass(frozen=True)
class CandidateRecord:
    """One prompt, its K >= 1 candidates and, once scored, their K rewards."""

    id: str
    prompt: str
    prompt_ids: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    rewards: tuple[float, ...] | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """What a reward source reads."""
        return tuple(candidate.text for candidate in self.candidates)


def read_candidates(path: Path) -> list[CandidateRecord]:
    """Read a candidates file, or the one in a stage's output directory.

    Raises DataError naming file and line for anything malformed: also duplicate ids, NaN log-probs or rewards, and
    a number of rewards other than K.
    """
    file = path / CANDIDATES_FILE if path.is_dir() else path
    return [parse_candidate_record(record) for record in read_jsonl_records(file)]


def write_candidates(path: Path, records: Iterable[CandidateRecord]) -> None:
    """Write records to the file `path`, all or nothing. Non-finite log-probs and rewards are a ValueError."""
    write_jsonl(path, map(_stored, records))


def parse_candidate_record(record: SourceRecord) -> CandidateRecord:
    """Check one stored record and give it its types; DataError at the record's file and line."""
    where, fields = record.where, record.fields
    candidates = tuple(
        _parse_candidate(f"{where} candidates[{k}]", item)
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
    )


def _parse_candidate(where: str, fields: Mapping[str, Any]) -> Candidate:
    return Candidate(
        text=text(where, fields, "text"),
        token_ids=token_ids(where, fields, "token_ids"),
        finished=boolean(where, fields, "finished"),
        logprob=finite_number(where, fields, "logprob"),
    )


def _stored(record: CandidateRecord) -> dict[str, Any]:
    """The record as JSON. `rewards` is absent, not null, before scoring."""
    numbers = [candidate.logprob for candidate in record.candidates] + list(record.rewards or ())
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"record {record.id!r} has a log-prob or reward that is not finite")
    stored = asdict(record)
    if record.rewards is None:
        del stored["rewards"]
    return stored
