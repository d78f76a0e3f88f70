"""The score stage shard by shard: what a restart keeps, how ranks share the work, and what is in memory."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exo_megatron.config.stages import ScoreConfig
from exo_megatron.data import shards
from exo_megatron.data.candidates import Candidate, CandidateRecord, stored_candidates, write_candidates
from exo_megatron.data.reading import Interpreter
from exo_megatron.data.scorable import join_surveys, read_known_shares, read_shares, survey
from exo_megatron.data.shards import RunShards, count_shards, records_of
from exo_megatron.errors import DataError
from exo_megatron.rewards.records import own_part
from exo_megatron.stages import score
from tests.reference.candidates import read_candidates, read_scorable
from tests.unit.conftest import LoneRuntime

PER_SHARD = 4


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", PER_SHARD)
    SEEN.clear()
    BROKEN.clear()


SEEN: list[str] = []
BROKEN: set[str] = set()


def judge(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Different for all candidates. Fails for the texts in BROKEN."""
    SEEN.extend(completions)
    if BROKEN & set(completions):
        raise ValueError("broken")
    return [float(completion.split()[1]) / 7 for completion in completions]


def other(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """As `judge`, in the same module."""
    return [-reward for reward in judge(prompts, completions)]


def records(count: int, length: int = 2) -> list[CandidateRecord]:
    """Record i has 1 to 3 candidates; every text is one of its own."""
    return [
        CandidateRecord(
            f"r{i}",
            "p",
            (1, 5),
            tuple(Candidate(f"t {10 * i + k}", tuple(range(length)), True) for k in range(i % 3 + 1)),
            columns={"first": 1} if i == 0 else {"later": i} if i == count - 1 else {},
        )
        for i in range(count)
    ]


def write_shards(output: Path, given: Sequence[CandidateRecord]) -> Path:
    writer = RunShards(output / "candidates", count_shards(len(given)), "drawn")
    writer.take_over()
    for number in range(writer.count):
        part = records_of(range(number, number + 1), len(given))
        writer.write(number, map(stored_candidates, given[part.start : part.stop]), {})
    return output


def config(output: Path, candidates: Path, name: str = "judge", **reward: Any) -> ScoreConfig:
    reward = {"function": f"{__name__}:{name}", "batch_size": 5, **reward}
    return ScoreConfig.model_validate({"output": output, "candidates": candidates, "reward": reward})


def run(config: ScoreConfig) -> None:
    score.run_score(config, LoneRuntime())  # type: ignore[arg-type]


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_shards_and_a_single_file_are_scored_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = records(10)
    write_candidates(tmp_path / "mine.jsonl", given)
    inputs = {"file": tmp_path / "mine.jsonl", "shards": write_shards(tmp_path / "rollout", given)}
    (tmp_path / "rollout" / "rollout.json").write_text('{"temperature": 0.8}')
    inputs["directory"] = tmp_path / "rollout" / "candidates"
    for name, path in inputs.items():
        run(config(tmp_path / name, path))
        scored = read_candidates(tmp_path / name)
        assert [replace(record, rewards=None) for record in scored] == given
        expected = [[(10 * i + k) / 7 for k in range(i % 3 + 1)] for i in range(10)]
        assert [list(record.rewards or ()) for record in scored] == expected
        assert sorted(path.name for path in (tmp_path / name / "candidates").glob("*.jsonl")) == [
            f"shard-0000{n}-of-00003.jsonl" for n in range(3)
        ]
        assert (tmp_path / name / "rollout.json").exists() == (name != "file")
        assert (tmp_path / name / "score.json").read_bytes() == (tmp_path / "file" / "score.json").read_bytes()
    told = capsys.readouterr().out
    assert f"data: {tmp_path}/rollout: 3 shards, 10 records: 10 as stored candidates" in told
    assert f"data: {tmp_path}/mine.jsonl: JSON, 10 records: 10 as stored candidates" in told


@pytest.mark.parametrize("damage", [False, True])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, damage: bool) -> None:
    drawn = write_shards(tmp_path / "rollout", records(10))
    run(config(tmp_path / "whole", drawn))
    BROKEN.add("t 90")
    with pytest.raises(Exception, match="broken"):
        run(config(tmp_path / "cut", drawn))
    assert not (tmp_path / "cut" / "score.json").exists()
    if damage:
        first = tmp_path / "cut" / "candidates" / "shard-00000-of-00003.jsonl"
        first.write_bytes(first.read_bytes()[:-1])
    BROKEN.clear()
    SEEN.clear()
    run(config(tmp_path / "cut", drawn))
    again = {int(text.split()[1]) // 10 for text in SEEN}
    assert again == ({8, 9} if not damage else {0, 1, 2, 3, 8, 9})
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_another_reward_or_input_is_scored_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = write_shards(tmp_path / "rollout", records(10))
    own = "def judge(prompts, completions):\n    return [1.0 for _ in completions]\n"
    (tmp_path / "rewards_of_this_test.py").write_text(own)
    monkeypatch.syspath_prepend(tmp_path)

    def redone(settings: ScoreConfig) -> bool:
        """Whether the shards of the last run were not kept; what is in them does not count."""
        paths = list((tmp_path / "out" / "candidates").iterdir())
        before = [path.stat().st_mtime_ns for path in paths]
        run(settings)
        (changed,) = {path.stat().st_mtime_ns != time for path, time in zip(paths, before, strict=True)}
        return changed

    run(config(tmp_path / "out", drawn))
    assert not redone(config(tmp_path / "out", drawn))
    assert redone(config(tmp_path / "out", drawn, "other"))
    mine = config(tmp_path / "out", drawn, function="rewards_of_this_test:judge")
    assert redone(mine) and not redone(mine)
    (tmp_path / "rewards_of_this_test.py").write_text(own.replace("1.0", "2.0"))
    assert redone(mine), "the function's file has changed"
    given = records(10)
    write_shards(drawn, [*given[:-1], replace(given[-1], prompt="q")])
    assert redone(mine)


def test_ranks_share_all_shards_that_are_not_finished(tmp_path: Path) -> None:
    drawn = write_shards(tmp_path / "rollout", records(4 * 11))
    settings = config(tmp_path / "out", drawn)
    surveys = [survey(share) for share in read_shares(drawn, Interpreter("score"), lambda number: True)]
    contents = join_surveys(reversed(surveys))
    assert contents.names == ["first", "later"]
    assert contents.completions == [sum(len(r.candidates) for r in records(44)[4 * n : 4 * n + 4]) for n in range(11)]
    work = score._plan(settings, contents, 4)
    assert work.alone == [[0, 4], [1, 5], [2, 6], [3, 7]] and work.together == [8, 9, 10]
    work.shards.write(1, [], {})
    work.shards.write(6, [], {})
    work = score._plan(settings, contents, 4)
    assert work.alone == [[0, 5], [2, 7], [3, 8], [4, 9]] and work.together == [10]
    parts = [own_part(10, _rank(rank, 4)) for rank in range(4)]
    assert [number for part in parts for number in part] == list(range(10))


def test_shares_that_another_process_has_seen_otherwise_are_refused(tmp_path: Path) -> None:
    """Changed after the survey, or another directory on another node: with another record, fewer shards, or a gap."""
    drawn, interpreter = write_shards(tmp_path / "rollout", records(12)), Interpreter("score")
    surveys = [survey(share) for share in read_shares(drawn, interpreter, lambda number: True)]
    contents = join_surveys(surveys)

    def read(directory: Path, wanted: set[int]) -> list[int]:
        return [share.number for share in read_known_shares(directory, interpreter, contents, wanted)]

    assert read(drawn, {0, 2}) == [0, 2]
    fewer = write_shards(tmp_path / "fewer", records(4))
    other = write_shards(tmp_path / "other", [*records(11), replace(records(12)[-1], prompt="q")])
    assert read(other, {0, 1}) == [0, 1]
    for directory in (fewer, other):
        with pytest.raises(DataError, match="changed while it was read"):
            read(directory, {2})
    with pytest.raises(DataError, match="changed while it was read"):
        join_surveys(surveys[::2])


def _rank(rank: int, world_size: int) -> Any:
    class Runtime(LoneRuntime):
        pass

    Runtime.rank, Runtime.world_size = rank, world_size
    return Runtime()


def test_ids_that_two_shards_have(tmp_path: Path) -> None:
    given = records(10)
    drawn = write_shards(tmp_path / "rollout", [*given[:9], replace(given[9], id="r2")])
    with pytest.raises(DataError) as caught:
        run(config(tmp_path / "out", drawn))
    first, last = (drawn / "candidates" / f"shard-0000{n}-of-00003.jsonl" for n in (0, 2))
    assert (caught.value.where, caught.value.problem) == (f"{last}:2", f"repeats id 'r2' of {first}:3")


def test_a_malformed_record_is_told_before_the_reward_source_is_loaded(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": "p", "completions": [" a"]})] * 9 + ['{"prompt": "p", "completions": [7]}']
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"mine\.jsonl:10"):
        run(config(tmp_path / "out", tmp_path / "mine.jsonl", function="no.such:module"))


def test_unwanted_shares_of_a_file_are_passed_over(tmp_path: Path) -> None:
    write_candidates(tmp_path / "mine.jsonl", records(12))
    (share,) = read_shares(tmp_path / "mine.jsonl", Interpreter("score"), {1}.__contains__)
    assert (share.number, [record.id for record in share.records]) == (1, ["r4", "r5", "r6", "r7"])
    assert [record.id for record in read_scorable(tmp_path / "mine.jsonl")] == [f"r{i}" for i in range(12)]
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no record"):
        list(read_shares(tmp_path / "empty.jsonl", Interpreter("score"), {1}.__contains__))


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path) -> None:
    peaks = []
    run(config(tmp_path / "before", write_shards(tmp_path / "few", records(12))))  # what is loaded only once
    for count in (12, 204):  # the largest shards of both have nine candidates
        drawn = write_shards(tmp_path / str(count), records(count, length=600))
        gc.collect()
        tracemalloc.start()
        run(config(tmp_path / f"out-{count}", drawn))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    more = (204 - 12) * 2 * 600 * 8  # the ids alone, as 8 bytes each, of all records that are more
    assert peaks[1] < peaks[0] + more / 3
