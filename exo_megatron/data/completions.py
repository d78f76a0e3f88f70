"""Candidates that did not come from `rollout`: texts under the keys `prompt` and `completions`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from exo_megatron.data.candidates import CandidateRecord, parse_candidate_record, write_candidates
from exo_megatron.data.reading import read_layouts
from exo_megatron.data.records import SourceRecord
from exo_megatron.data.sources import open_source
from exo_megatron.data.text import completion_texts, prompt_text
from exo_megatron.errors import DataError
from exo_megatron.utils.files import write_jsonl


@dataclass(frozen=True)
class CompletionsRecord:
    """One prompt, its K >= 1 candidates as strings and, once scored, their K rewards."""

    id: str
    prompt: str
    completions: tuple[str, ...]
    rewards: tuple[float, ...] | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The K texts that a reward source reads."""
        return self.completions


ScorableRecord = CandidateRecord | CompletionsRecord


def read_scorable(path: Path, *, tell: Callable[[str], object] | None = None) -> list[ScorableRecord]:
    """Read the input of `score`, in one of two formats that the first record decides.

    The input is a rollout's output directory, a file of its records, or any data source whose layout
    has several completions. Rewards in it are dropped. `tell` gets a line that says what it was taken
    for. Raises DataError, which names file and line, for a malformed record.
    """
    if not path.exists():
        raise DataError(
            str(path), "does not exist", expected="output of `rollout`, or a file", fix="correct candidates"
        )
    source = open_source(str(path))
    reading = read_layouts(source, source.read(), "score")
    if tell is not None:
        tell(f"data: {reading.description}")
    records = reading.records
    if "completions" in records[0].fields:
        return [_parse(record) for record in records]
    return [parse_candidate_record(record) for record in records]


def write_scored(path: Path, records: Sequence[ScorableRecord]) -> None:
    """Write records to the file `path` atomically, in the format in which they were read."""
    candidates = [record for record in records if isinstance(record, CandidateRecord)]
    if candidates:
        write_candidates(path, candidates)
    else:
        write_jsonl(path, _stored(record for record in records if isinstance(record, CompletionsRecord)))


def _stored(records: Iterable[CompletionsRecord]) -> Iterable[dict[str, object]]:
    return (asdict(record) for record in records)


def _parse(record: SourceRecord) -> CompletionsRecord:
    prompt = prompt_text(record.where, record.fields)
    completions = completion_texts(record.where, record.fields, "completions", prompt=prompt)
    texts = tuple(completion for completion in completions if isinstance(completion, str))
    if not isinstance(prompt, str) or len(texts) != len(completions):
        raise DataError(
            record.where,
            "prompt and completions are chat messages",
            expected="strings: a reward source reads text",
            fix="render the messages, or draw candidates with `exo-megatron rollout`, which does",
        )
    return CompletionsRecord(record.id, prompt, texts)
