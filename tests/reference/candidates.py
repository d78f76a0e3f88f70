"""What `rollout` and `score` leave, read back, and what `score` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exo_megatron.data.candidates import CandidateRecord, parse_candidate_record
from exo_megatron.data.completions import ScorableRecord
from exo_megatron.data.reading import Interpreter
from exo_megatron.data.scorable import read_shares
from exo_megatron.data.sources import open_source


def read_candidates(path: Path) -> list[CandidateRecord]:
    """The records of a candidates file, or of the shards in a stage's output directory."""
    return [parse_candidate_record(record) for record in open_source(str(path)).read()]


def read_scorable(path: Path) -> list[ScorableRecord]:
    """All records that `score` reads."""
    shares = read_shares(path, Interpreter("score"), lambda number: True)
    return [record for share in shares for record in share.records]


def stored_lines(output: Path) -> list[dict[str, Any]]:
    """The JSON values in the shards of a stage's output directory."""
    shards = sorted((output / "candidates").glob("*.jsonl"))
    return [json.loads(line) for shard in shards for line in shard.read_text(encoding="utf-8").splitlines()]
