"""Stored candidates: written and read back exactly, and no malformed record passes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from exo_megatron.data.candidates import Candidate, CandidateRecord, write_candidates
from exo_megatron.data.logprob_source import LogprobSource
from exo_megatron.errors import DataError
from tests.reference.candidates import read_candidates

SOURCE = LogprobSource(fingerprint="f" * 64, temperature=0.1 + 0.2, precision="bf16")
RECORDS = [
    CandidateRecord(
        id="a",
        prompt="The movie\nwas",
        prompt_ids=(1, 5, 6),
        candidates=(
            Candidate(" good", (7, 2), True, -0.1 - 0.2, "0123456789abcdef"),
            Candidate(" schön \u2028", (8,), False, -1e-300, "fedcba9876543210"),
        ),
        rewards=(1.5, -2.0),
        logprob_source=SOURCE,
    ),
    CandidateRecord("b", "", (1,), (Candidate("", (2,), True, 0.0),)),
    CandidateRecord("c", "of one's own making", (1,), (Candidate("", (2,), True),), rewards=(0.0,)),
]


def stored() -> dict[str, Any]:
    return {
        "id": "a",
        "prompt": "p",
        "prompt_ids": [1, 2],
        "candidates": [{"text": "x", "token_ids": [3], "finished": True, "logprob": -1}],
        "rewards": [0.5],
    }


def sourced() -> dict[str, Any]:
    """The same with what ties its log-prob to model, temperature, precision and ids."""
    record = stored()
    record["candidates"][0]["logprob_digest"] = "0123456789abcdef"
    return {**record, "logprob_source": {"fingerprint": "f", "temperature": 1, "precision": "fp32"}}


def test_round_trip_of_a_file_and_of_a_stage_directory(tmp_path: Path) -> None:
    write_candidates(tmp_path / "candidates.jsonl", RECORDS)
    assert read_candidates(tmp_path / "candidates.jsonl") == RECORDS
    assert read_candidates(tmp_path) == RECORDS


def test_the_format_is_the_documented_one(tmp_path: Path) -> None:
    path = tmp_path / "candidates.jsonl"
    write_candidates(path, RECORDS)
    first, second, third = map(json.loads, path.read_text(encoding="utf-8").strip("\n").split("\n"))
    assert first == {
        "id": "a",
        "prompt": "The movie\nwas",
        "prompt_ids": [1, 5, 6],
        "candidates": [
            {
                "text": " good",
                "token_ids": [7, 2],
                "finished": True,
                "logprob": -0.1 - 0.2,
                "logprob_digest": "0123456789abcdef",
            },
            {
                "text": " schön \u2028",
                "token_ids": [8],
                "finished": False,
                "logprob": -1e-300,
                "logprob_digest": "fedcba9876543210",
            },
        ],
        "rewards": [1.5, -2.0],
        "logprob_source": {"fingerprint": "f" * 64, "temperature": 0.1 + 0.2, "precision": "bf16"},
    }
    assert "rewards" not in second and "logprob_source" not in second
    assert third["candidates"] == [{"text": "", "token_ids": [2], "finished": True}]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path, bad: float) -> None:
    path = tmp_path / "candidates.jsonl"
    write_candidates(path, RECORDS[1:])
    for record in (
        CandidateRecord("a", "p", (1,), (Candidate("", (2,), True, bad),)),
        CandidateRecord("a", "p", (1,), (Candidate("", (2,), True, 0.0),), rewards=(bad,)),
    ):
        with pytest.raises(ValueError, match="'a' has a log-prob or reward that is not finite"):
            write_candidates(path, [RECORDS[0], record])
    assert read_candidates(path) == RECORDS[1:], "the old file is untouched"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"prompt": 3}, "'prompt' is 3; expected a string"),
        ({"prompt": None}, "no field 'prompt'"),
        ({"prompt_ids": []}, "'prompt_ids' is []"),
        ({"prompt_ids": [1, True]}, "'prompt_ids' is [1, True]"),
        ({"prompt_ids": [1, -1]}, "token ids >= 0"),
        ({"candidates": []}, "non-empty list of objects"),
        ({"candidates": [3]}, "non-empty list of objects"),
        ({"rewards": [0.5, 0.5]}, "has 2 rewards for 1 candidates"),
        ({"rewards": [math.nan]}, "'rewards[0]' is nan; expected a finite number"),
        ({"rewards": [math.inf]}, "'rewards[0]' is inf"),
        ({"rewards": ["1"]}, "'rewards[0]' is '1'"),
        ({"rewards": [10**400]}, "expected a finite number"),
        ({"prompt": "half \ud83d"}, "unpaired surrogate ('\\ud83d') at character 5"),
        ({"rewards": [True]}, "'rewards[0]' is True"),
        ({"rewards": 0.5}, "expected a list of numbers"),
    ],
)
def test_bad_records(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = tmp_path / "candidates.jsonl"
    path.write_text(json.dumps({**stored(), "id": "b"}) + "\n" + json.dumps({**stored(), **change}) + "\n")
    with pytest.raises(DataError) as error:
        read_candidates(path)
    assert str(error.value).startswith(f"{path}:2") and expected in str(error.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"text": None}, "'text' is None"),
        ({"token_ids": []}, "'token_ids' is []"),
        ({"token_ids": "12"}, "'token_ids' is '12'"),
        ({"finished": 1}, "'finished' is 1; expected true or false"),
        ({"logprob": math.nan}, "'logprob' is nan"),
        ({"logprob": None}, "has not both 'logprob' and 'logprob_digest', but its record has 'logprob_source'"),
        ({"logprob": "-1"}, "'logprob' is '-1'"),
        ({"logprob_digest": None}, "remove 'logprob_source' from the record"),
        ({"logprob_digest": 12}, "'logprob_digest' is 12; expected a string"),
    ],
)
def test_bad_candidates(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = tmp_path / "candidates.jsonl"
    record = sourced()
    record["candidates"] = [{**record["candidates"][0], **change}]
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(DataError) as error:
        read_candidates(path)
    assert str(error.value).startswith(f"{path}:1 candidates[0]: ") and expected in str(error.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("abc", "'logprob_source' is 'abc'; expected an object with fingerprint, temperature and precision"),
        ({"fingerprint": "f", "temperature": 1.0}, "has no field 'precision'"),
        ({"fingerprint": "f", "temperature": "1", "precision": "fp32"}, "'temperature' is '1'"),
        ({"fingerprint": 5, "temperature": 1.0, "precision": "fp32"}, "'fingerprint' is 5"),
    ],
)
def test_bad_sources(tmp_path: Path, change: object, expected: str) -> None:
    path = tmp_path / "candidates.jsonl"
    path.write_text(json.dumps({**sourced(), "logprob_source": change}) + "\n")
    with pytest.raises(DataError) as error:
        read_candidates(path)
    assert str(error.value).startswith(f"{path}:1") and expected in str(error.value)


def test_log_probs_of_ones_own_making_need_no_source_and_may_be_absent_or_null(tmp_path: Path) -> None:
    """Null is how columnar data sets store what only some of their records have."""
    path = tmp_path / "candidates.jsonl"
    for change in ({}, {"logprob": None, "logprob_digest": None}):
        record = stored()
        del record["candidates"][0]["logprob"]
        record["candidates"][0] |= change
        path.write_text(json.dumps({**record, "logprob_source": None}) + "\n")
        (read,) = read_candidates(path)
        assert read.logprob_source is None and read.candidates == (Candidate("x", (3,), True),)


def test_missing_candidate_field_and_file(tmp_path: Path) -> None:
    path = tmp_path / "candidates.jsonl"
    record = stored()
    record["candidates"][0]["tokens_ids"] = record["candidates"][0].pop("token_ids")
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(DataError, match="rename 'tokens_ids' to 'token_ids'"):
        read_candidates(path)
    with pytest.raises(DataError, match="does not exist"):
        read_candidates(tmp_path / "absent")
