"""The score stage: shares of ranks, order, stored files, and rewards that are not finite."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exo_megatron.config.sections import RewardConfig
from exo_megatron.config.stages import ScoreConfig
from exo_megatron.data.candidates import Candidate, CandidateRecord, write_candidates
from exo_megatron.data.completions import column_names
from exo_megatron.data.logprob_source import LogprobSource
from exo_megatron.errors import RewardError
from exo_megatron.rewards.function import FunctionReward
from exo_megatron.rewards.records import score_records
from exo_megatron.rewards.source import Completion
from exo_megatron.rewards.summary import RewardSums, join_sums
from exo_megatron.stages.score import run_score
from exo_megatron.utils.files import read_json, write_json
from tests.reference.candidates import read_candidates, stored_lines


@dataclass
class FakeRuntime:
    """One rank of a world whose ranks run one after another, rank 0 last, and leave what they gather in `inbox`."""

    rank: int
    world_size: int
    inbox: dict[int, Any]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def begin(self, what: str) -> None:
        pass

    def broadcast_object(self, value: Any) -> Any:
        return value  # only rank 0, alone

    def gather_items(self, items: Sequence[Any]) -> list[Any] | None:
        self.inbox[self.rank] = items
        if not self.is_main:
            return None
        return [item for rank in range(self.world_size) for item in self.inbox[rank]]


class Lengths:
    """Rewards a completion by its length, and remembers how it was asked."""

    def __init__(self) -> None:
        self.calls: list[list[Completion]] = []

    def score(self, completions: Sequence[Completion]) -> list[float]:
        self.calls.append(list(completions))
        return [100.0 * len(each.prompt) + len(each.text) for each in completions]


def records(count: int) -> list[CandidateRecord]:
    """Record i has a prompt of i + 1 letters and 1 to 3 candidates."""
    return [
        CandidateRecord(
            id=f"r{i}",
            prompt="p" * (i + 1),
            prompt_ids=(1, 5),
            candidates=tuple(Candidate("c" * (k + i), (7, 2), True, -1.5, f"digest {k}") for k in range(i % 3 + 1)),
            logprob_source=LogprobSource(fingerprint="f", temperature=0.8, precision="fp32"),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_candidate_gets_its_own_reward(world_size: int, batch_size: int) -> None:
    given = records(5)
    inbox: dict[int, Any] = {}
    source = Lengths()
    for rank in reversed(range(world_size)):
        runtime: Any = FakeRuntime(rank, world_size, inbox)
        scored = score_records(given, source, runtime, names=[], batch_size=batch_size)
        assert (scored is None) == (rank > 0)
    assert scored == [
        replace(r, rewards=tuple(100.0 * len(r.prompt) + len(c.text) for c in r.candidates)) for r in given
    ]
    assert sum(len(call) for call in source.calls) == sum(len(r.candidates) for r in given)
    assert all(len(call) <= batch_size for call in source.calls)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, -1e13])
def test_a_reward_that_is_not_finite_is_named(value: float) -> None:
    class Broken:
        def score(self, completions: Sequence[Completion]) -> list[float]:
            return [value if (each.prompt, each.text) == ("ppp", "cccc") else 0.0 for each in completions]

    runtime: Any = FakeRuntime(0, 1, {})
    with pytest.raises(RewardError) as caught:
        score_records(records(3), Broken(), runtime, names=[], batch_size=2)
    assert caught.value.where == "record 'r2', candidate 2"
    assert str(value) in caught.value.problem


def word_count(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The reward function of the test below."""
    return [float(len((p + c).split())) for p, c in zip(prompts, completions, strict=True)]


def score_config(tmp_path: Path, candidates: Path) -> ScoreConfig:
    reward = RewardConfig(function=f"{__name__}:word_count", batch_size=2)
    return ScoreConfig(output=tmp_path / "scored", candidates=candidates, reward=reward)


def test_stage_writes_rewards_rollout_and_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [replace(r, candidates=tuple(replace(c, text=f" {c.text} x") for c in r.candidates)) for r in records(3)]
    (tmp_path / "rollout").mkdir()
    write_candidates(tmp_path / "rollout" / "candidates.jsonl", given)
    write_json(tmp_path / "rollout" / "rollout.json", {"temperature": 0.8})
    runtime: Any = FakeRuntime(0, 1, {})
    run_score(score_config(tmp_path, tmp_path / "rollout"), runtime)
    scored = read_candidates(tmp_path / "scored")
    # The first candidate of record 0 has the empty text "" between its spaces.
    assert [r.rewards for r in scored] == [(2.0,), (3.0, 3.0), (3.0, 3.0, 3.0)]
    assert [replace(r, rewards=None) for r in scored] == given
    assert read_json(tmp_path / "scored" / "rollout.json") == {"temperature": 0.8}
    assert read_json(tmp_path / "scored" / "score.json") == {
        "prompts": 3,
        "candidates": 6,
        "reward_mean": 17 / 6,
        "reward_std": pytest.approx(math.sqrt(5 / 36)),
        "equal_share": 1.0,
    }
    assert "6 candidates of 3 prompts: mean 2.8333" in capsys.readouterr().out


def test_candidates_of_ones_own_making_have_no_rollout_file(tmp_path: Path) -> None:
    write_candidates(tmp_path / "mine.jsonl", records(2))
    runtime: Any = FakeRuntime(0, 1, {})
    run_score(score_config(tmp_path, tmp_path / "mine.jsonl"), runtime)
    assert sorted(path.name for path in (tmp_path / "scored").iterdir()) == [
        "candidates",
        "candidates.jsonl",
        "data_report.json",
        "score.json",
    ]


def test_summary_by_hand_and_by_shares() -> None:
    groups = [(1.0, 3.0), (2.0, 2.0), (0.0, 0.0), (5.0, 3.0)]
    # Mean 16 / 8; squared deviations 1 + 1 + 0 + 0 + 4 + 4 + 9 + 1 = 20.
    expected = {"prompts": 4, "candidates": 8, "reward_mean": 2.0, "reward_std": math.sqrt(20 / 8), "equal_share": 0.5}
    for shares in ([groups], [groups[:1], groups[1:]], [[group] for group in groups]):
        assert join_sums(map(RewardSums.of, shares)).summary() == pytest.approx(expected, rel=1e-14)


def test_the_spread_of_rewards_far_from_zero() -> None:
    """Where a difference of two sums of squares has no correct digit."""
    rewards = [1e9 + value for value in (0.0, 1.0, 2.0, 3.0)]
    summary = join_sums(RewardSums.of([[reward]]) for reward in rewards).summary()
    assert summary["reward_std"] == pytest.approx(math.sqrt(5 / 4), rel=1e-6)


def test_written_completions_are_scored_and_ready_for_align(tmp_path: Path) -> None:
    """Completions of the user's own making, in the format that `load_groups` reads with rewards."""
    lines = [{"prompt": "a b", "completions": [" c d e", " f"]}, {"id": "x", "prompt": "g", "completions": [" h i"]}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reward = RewardConfig(kind="function", function=f"{__name__}:word_count")
    runtime: Any = FakeRuntime(0, 1, {})
    run_score(ScoreConfig(output=tmp_path / "out", candidates=tmp_path / "mine.jsonl", reward=reward), runtime)
    assert stored_lines(tmp_path / "out") == [
        {"id": "line-1", "prompt": "a b", "completions": [" c d e", " f"], "rewards": [5.0, 3.0]},
        {"id": "x", "prompt": "g", "completions": [" h i"], "rewards": [3.0]},
    ]


def conversations(prompts: list[str], completions: list[str], messages: list[Any], answer: list[int]) -> list[float]:
    """The reward function of the test below; it sees every value that it is given."""
    SEEN.extend(zip(prompts, completions, messages, answer, strict=True))
    return [float(value) for value in answer]


SEEN: list[tuple[Any, ...]] = []


def test_completions_of_messages_keep_their_form_and_columns(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("b", "c")]
    tools = [{"type": "function", "function": {"name": "add"}}]
    chat = {"id": "x", "prompt": prompt, "completions": answers, "answer": 4, "log_weights": [0.0, 1.0], "tools": tools}
    text = {"prompt": prompt[1:], "completions": answers[:1], "answer": 5, "id": "y"}
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (chat, text)))
    reward = RewardConfig(kind="function", function=f"{__name__}:conversations", batch_size=2)
    runtime: Any = FakeRuntime(0, 1, {})
    SEEN.clear()
    for source, output in (("chat.jsonl", "first"), ("first", "second")):  # what is written can be scored again
        run_score(ScoreConfig(output=tmp_path / output, candidates=tmp_path / source, reward=reward), runtime)
        assert stored_lines(tmp_path / output) == [chat | {"rewards": [4.0, 4.0]}, text | {"rewards": [5.0]}]
    expected = [
        ("system: s\n\nuser: a\n\nassistant: ", "b", [*prompt, *answers[0]], 4),
        ("system: s\n\nuser: a\n\nassistant: ", "c", [*prompt, *answers[1]], 4),
        ("user: a\n\nassistant: ", "b", [*prompt[1:], *answers[0]], 5),
    ]
    assert expected * 2 == SEEN


def test_every_rank_gives_a_function_the_same_columns(tmp_path: Path) -> None:
    """Whether a parameter with a default is a column does not depend on the share of a rank."""
    given = [replace(each, columns={"answer": 1} if each.id != "r0" else {}) for each in records(2)]
    seen: list[object] = []

    def judge(prompts: list[str], completions: list[str], answer: object = None) -> list[float]:
        seen.append(answer)
        return [0.0] * len(completions)

    source = FunctionReward(judge, "judge")
    for rank, problem in ((1, None), (0, "has no column 'answer' (columns: none)")):
        runtime: Any = FakeRuntime(rank, 2, {})
        if problem is None:
            score_records(given, source, runtime, names=column_names(given), batch_size=8)
            continue
        with pytest.raises(RewardError) as caught:
            score_records(given, source, runtime, names=column_names(given), batch_size=8)
        assert (caught.value.where, caught.value.problem) == ("record 'r0', candidate 0", problem)
    assert seen == [[1, 1]]
