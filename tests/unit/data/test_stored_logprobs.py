"""Log-probs that the data bring along: taken where everything is the same, else an error that says what is not."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exo_megatron.config.sections import DataConfig
from exo_megatron.data.candidates import Candidate, CandidateRecord, write_candidates
from exo_megatron.data.dataset import load_groups
from exo_megatron.data.group_builder import Purpose
from exo_megatron.data.groups import Group
from exo_megatron.data.logprob_source import LogprobSource
from exo_megatron.data.stored_logprobs import WantedLogprobs
from exo_megatron.data.tokenizer import Tokenizer
from exo_megatron.errors import DataError

SOURCE = LogprobSource(fingerprint="a1" * 32, temperature=0.8, precision="bf16")
OTHER_MODEL = LogprobSource("b2" * 32, 0.8, "bf16")
OTHER_TEMPERATURE = LogprobSource("a1" * 32, 1.0, "bf16")
OTHER_PRECISION = LogprobSource("a1" * 32, 0.8, "fp32")
WANTED = WantedLogprobs(SOURCE, Path("runs/sft"))

Row = dict[str, Any]


def rollout(name: str, source: LogprobSource, *, shift: int) -> list[CandidateRecord]:
    """Three records of a rollout: K = 2, 3, 2, rewards that prefer the last candidate."""
    rows = []
    for i in range(3):
        prompt = (1, 300 + i + shift)
        ids = [(9, 20 + k + shift, 2) for k in range(3 if i == 1 else 2)]
        candidates = tuple(
            Candidate("x", y, True, -1.0 - i - k / 3, source.digest(prompt, y)) for k, y in enumerate(ids)
        )
        rewards = tuple(float(k) for k in range(len(ids)))
        rows.append(CandidateRecord(f"{name}{i}", "p", prompt, candidates, rewards, source))
    return rows


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., list[Row]]:
    def as_json(name: str = "r", source: LogprobSource = SOURCE, *, shift: int = 0) -> list[Row]:
        write_candidates(tmp_path / "made.jsonl", rollout(name, source, shift=shift))
        return [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]

    return as_json


def load(
    directory: Path,
    rows: list[Row],
    tokenizer: Tokenizer,
    wanted: WantedLogprobs | None = WANTED,
    purpose: Purpose = "rewards",
    limit: int | None = None,
) -> list[Group]:
    path = directory / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(load_groups(DataConfig(path=str(path), limit=limit), tokenizer, purpose=purpose, logprobs=wanted))


def refused(
    directory: Path, rows: list[Row], tokenizer: Tokenizer, line: int, wanted: WantedLogprobs = WANTED
) -> DataError:
    """The error, which is of this line; without a wish for stored log-probs the same data are accepted."""
    assert all(g.reference_logprobs is None for g in load(directory, rows, tokenizer, None))
    with pytest.raises(DataError) as error:
        load(directory, rows, tokenizer, wanted)
    assert error.value.where == f"{directory / 'data.jsonl'}:{line}"
    assert "\n" not in str(error.value)
    assert error.value.fix.endswith("or set reference_logprobs=computed to compute them anew")
    return error.value


Rows = Callable[..., list[Row]]


def test_taken_as_they_are_and_only_where_wanted(tmp_path: Path, spm: Tokenizer, rows: Rows) -> None:
    stored = [(-1.0, -1.0 - 1 / 3), (-2.0, -2.0 - 1 / 3, -2.0 - 2 / 3), (-3.0, -3.0 - 1 / 3)]
    assert [group.reference_logprobs for group in load(tmp_path, rows(), spm)] == stored
    assert [group.reference_logprobs for group in load(tmp_path, rows(), spm, None)] == [None] * 3


def test_a_pair_keeps_those_of_its_two_candidates(tmp_path: Path, spm: Tokenizer, rows: Rows) -> None:
    load(tmp_path, rows(), spm)
    config = DataConfig(path=str(tmp_path / "data.jsonl"))
    pairs = load_groups(config, spm, purpose="preference", pairs="best_and_worst", logprobs=WANTED)
    assert [pair.candidates for pair in pairs[:2]] == [((9, 21, 2), (9, 20, 2)), ((9, 22, 2), (9, 20, 2))]
    stored = [(-1.0 - 1 / 3, -1.0), (-2.0 - 2 / 3, -2.0), (-3.0 - 1 / 3, -3.0)]
    assert [pair.reference_logprobs for pair in pairs] == stored


def test_a_filtered_reordered_renamed_file_of_two_rollouts(tmp_path: Path, spm: Tokenizer, rows: Rows) -> None:
    """None of it changes what a number belongs to. Candidates, too, may be dropped and put in another order."""
    first, second = rows("r"), rows("s", shift=50)
    mixed = [second[2], first[1], second[0]]
    mixed[0]["id"] = "renamed"
    for name in ("candidates", "rewards"):
        mixed[1][name] = [mixed[1][name][2], mixed[1][name][0]]
    groups = load(tmp_path, mixed, spm)
    assert groups[0].reference_logprobs == (-3.0, -3.0 - 1 / 3)
    assert groups[1].candidates == ((9, 22, 2), (9, 20, 2))
    assert groups[1].reference_logprobs == (-2.0 - 2 / 3, -2.0)
    assert len(load(tmp_path, mixed, spm, limit=1)) == 1
    with gzip.open(tmp_path / "copy.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in mixed)
    config = DataConfig(path=str(tmp_path / "copy.jsonl.gz"))
    assert list(load_groups(config, spm, purpose="rewards", logprobs=WANTED)) == groups


def test_records_without_them_have_none(tmp_path: Path, spm: Tokenizer, rows: Rows) -> None:
    """Hand-made candidates, files of before there were sources, texts; also beside records that have some."""
    given = rows()
    del given[0]["logprob_source"]
    given[2] = {"id": "t", "prompt": "The movie", "completions": ["was good", "was bad"], "rewards": [1, 0]}
    found = [group.reference_logprobs is None for group in load(tmp_path, given, spm)]
    assert found == [True, False, True]


@pytest.mark.parametrize(("where", "named"), [("prompt", "candidates[0], candidates[1]"), ("candidate", "[1]")])
def test_changed_token_ids(tmp_path: Path, spm: Tokenizer, rows: Rows, where: str, named: str) -> None:
    given = rows()
    ids = given[2]["prompt_ids"] if where == "prompt" else given[2]["candidates"][1]["token_ids"]
    ids[1] += 1
    error = refused(tmp_path, given, spm, 3)
    assert "record 'r2' are of other data (token ids of prompt or" in error.problem and named in error.problem
    assert error.expected == "the token ids that they were computed for"
    assert "model" not in error.problem and "temperature" not in error.problem


def test_candidates_that_changed_places_with_those_of_another_prompt(
    tmp_path: Path, spm: Tokenizer, rows: Rows
) -> None:
    given = rows()
    given[0]["candidates"], given[2]["candidates"] = given[2]["candidates"], given[0]["candidates"]
    assert "other data" in refused(tmp_path, given, spm, 1).problem


def test_candidates_of_another_source_put_into_a_record(tmp_path: Path, spm: Tokenizer, rows: Rows) -> None:
    """The record's source speaks for all its candidates; those of another temperature do not pass under it."""
    given, warmer = rows(), rows("w", OTHER_TEMPERATURE)
    given[1]["candidates"][2] = warmer[1]["candidates"][2]
    assert "or candidates[2] were changed" in refused(tmp_path, given, spm, 2).problem


@pytest.mark.parametrize(
    ("source", "problem", "expected", "fix"),
    [
        (
            OTHER_MODEL,
            "the model with fingerprint b2b2b2b2b2b2b2b2",
            "the reference runs/sft with fingerprint a1a1a1a1a1a1a1a1",
            "set reference.checkpoint to the checkpoint of the rollout",
        ),
        (OTHER_TEMPERATURE, "temperature 1.0", "temperature 0.8", "set loss.temperature=1.0"),
        (OTHER_PRECISION, "precision fp32", "precision bf16", "set compute.precision=fp32"),
    ],
)
def test_another_source(
    tmp_path: Path, spm: Tokenizer, rows: Rows, source: LogprobSource, problem: str, expected: str, fix: str
) -> None:
    """Alone, and in the second of two files put together."""
    error = refused(tmp_path, rows("r", source), spm, 1)
    told = f"the stored log-probs of record 'r0' are of {problem}"
    assert error.problem == f"{told} (of 3 records 3 cannot be used: 3 log-probs of another source)"
    assert error.expected == expected
    assert error.fix == f"{fix}, or set reference_logprobs=computed to compute them anew"
    assert "record 's0'" in refused(tmp_path, rows() + rows("s", source), spm, 4).problem


def test_all_differences_are_told_at_once(tmp_path: Path, spm: Tokenizer, rows: Rows) -> None:
    given = rows("r", LogprobSource("b2" * 32, 1.5, "fp32"))
    given[0]["prompt_ids"][0] += 1
    error = refused(tmp_path, given, spm, 1)
    for word in ("other data", "b2b2b2b2b2b2b2b2", "temperature 1.5", "precision fp32"):
        assert word in error.problem


def test_a_source_edited_to_fit_is_found_out(tmp_path: Path, spm: Tokenizer, rows: Rows) -> None:
    given = rows("r", OTHER_TEMPERATURE)
    for row in given:
        row["logprob_source"]["temperature"] = 0.8
    assert "other data" in refused(tmp_path, given, spm, 1).problem


def test_digest_sees_everything_and_where_one_thing_ends() -> None:
    digests = [
        SOURCE.digest((1, 2), (3,)),
        SOURCE.digest((1,), (2, 3)),
        SOURCE.digest((12,), (3,)),
        SOURCE.digest((1, 2), (3, 2)),
        *(source.digest((1, 2), (3,)) for source in (OTHER_MODEL, OTHER_TEMPERATURE, OTHER_PRECISION)),
    ]
    assert len(set(digests)) == len(digests) and {len(digest) for digest in digests} == {16}
