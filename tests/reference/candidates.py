"""What `rollout` and `score` leave, read back."""

from __future__ import annotations

from pathlib import Path

from exo_megatron.data.candidates import CANDIDATES_FILE, CandidateRecord, parse_candidate_record
from exo_megatron.data.sources import read_jsonl_records


def read_candidates(path: Path) -> list[CandidateRecord]:
    """The records of a candidates file, or of the one in a stage's output directory."""
    file = path / CANDIDATES_FILE if path.is_dir() else path
    return [parse_candidate_record(record) for record in read_jsonl_records(file)]
