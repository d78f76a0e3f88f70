"""Which of a record's candidates make its group, that all their values go along, and what the user is told of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from exo_megatron.config.losses import LossSpec
from exo_megatron.config.sections import DataConfig
from exo_megatron.data.dataset import load_groups
from exo_megatron.data.groups import Group, data_digest
from exo_megatron.data.logprob_source import LogprobSource
from exo_megatron.data.stored_logprobs import WantedLogprobs
from exo_megatron.data.tokenizer import Tokenizer
from exo_megatron.errors import ConfigError, DataError, TieError

Row = dict[str, Any]
GOOD, BAD, DULL = " was good .", " was bad .", " is not so dull ."
SOURCE = LogprobSource(fingerprint="a1" * 32, temperature=0.8, precision="bf16")
WANTED = WantedLogprobs(SOURCE, Path("runs/sft"))
EVERYTHING = LossSpec("", "rewards", (), log_weights=True, token_logps=True)
ALL = {"pairs": "best_and_worst"}


def ids(k: int) -> list[int]:
    """The ids of candidate k, k + 2 of them."""
    return [20 + k] * (k + 1) + [2]


def drawn(name: str, rewards: Sequence[float], source: LogprobSource | None = SOURCE) -> Row:
    """A scored record of a rollout; every value of candidate k has the number k in it."""
    prompt = [1, 300]
    numbers = range(len(rewards))
    candidates: list[Row] = [{"text": f"y{k}", "token_ids": ids(k), "finished": True} for k in numbers]
    row: Row = {"id": name, "prompt": "p", "prompt_ids": prompt, "candidates": candidates, "rewards": list(rewards)}
    if source is not None:
        for k in numbers:
            candidates[k] |= {"logprob": -10.0 - k, "logprob_digest": source.digest(prompt, ids(k))}
        row["logprob_source"] = dict(vars(source))
    row["log_weights"] = [0.5 + k for k in numbers]
    row["reference_token_logprobs"] = [[-1.0 - k] * (k + 2) for k in numbers]
    row["behaviour_token_logprobs"] = [[-2.0 - k] * (k + 2) for k in numbers]
    return row


def texts(name: str, rewards: Sequence[float]) -> Row:
    """A record of completions, as many of the three texts as rewards."""
    return {"id": name, "prompt": "The movie", "completions": [GOOD, BAD, DULL][: len(rewards)], "rewards": rewards}


def group(name: str, numbers: Sequence[int], rewards: Sequence[float]) -> Group:
    """The group of the candidates with these numbers of a record that `drawn` made."""
    return Group(
        name,
        (1, 300),
        tuple(tuple(ids(k)) for k in numbers),
        rewards=tuple(rewards[k] for k in numbers),
        reference_logprobs=tuple(-10.0 - k for k in numbers),
        log_weights=tuple(0.5 + k for k in numbers),
        reference_token_logprobs=tuple((-1.0 - k,) * (k + 2) for k in numbers),
        behaviour_token_logprobs=tuple((-2.0 - k,) * (k + 2) for k in numbers),
    )


class Data:
    """Records in a file, read with any settings; `lines` are those that were told."""

    def __init__(self, directory: Path, tokenizer: Tokenizer) -> None:
        self.path = directory / "data.jsonl"
        self.tokenizer = tokenizer
        self.lines: list[str] = []

    def load(self, purpose: Any, *rows: Row, limits: dict[str, int] | None = None, **settings: Any) -> list[Group]:
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.lines.clear()
        config = DataConfig(path=str(self.path), **(limits or {}))
        groups = list(load_groups(config, self.tokenizer, purpose=purpose, tell=self.lines.append, **settings))
        del self.lines[:2]  # what the file was taken for, and an example
        return groups

    def candidates(self, purpose: Any, *rows: Row, **settings: Any) -> list[list[int]]:
        """The numbers of the candidates in each group of records that `drawn` made."""
        return [[y[0] - 20 for y in group.candidates] for group in self.load(purpose, *rows, **settings)]


@pytest.fixture
def data(tmp_path: Path, spm: Tokenizer) -> Data:
    return Data(tmp_path, spm)


REWARDS = (0.5, 1.5, 9.0, -7.0)


@pytest.mark.parametrize(
    ("purpose", "settings", "numbers"),
    [
        ("rewards", {}, (0, 1, 2, 3)),
        ("rewards", {"candidates": 4}, (0, 1, 2, 3)),
        ("rewards", {"candidates": 3}, (0, 1, 2)),
        ("rewards", {"candidates": 2}, (0, 1)),
        ("preference", {}, (1, 0)),
        ("preference", {"candidates": 2}, (1, 0)),
        ("preference", ALL, (2, 3)),
        ("preference", {**ALL, "candidates": 4}, (2, 3)),
        ("preference", {**ALL, "candidates": 3}, (2, 0)),
        ("preference", {**ALL, "candidates": 2}, (1, 0)),
    ],
)
def test_all_values_of_a_candidate_go_along(
    data: Data, purpose: str, settings: dict[str, Any], numbers: tuple[int, ...]
) -> None:
    """Rewards, stored log-probs, importance weights and log-probs of tokens are those of the candidates taken."""
    found = data.load(purpose, drawn("r", REWARDS), logprobs=WANTED, loss=EVERYTHING, **settings)
    assert found == [group("r", numbers, REWARDS)]


@pytest.mark.parametrize(("rewards", "chosen"), [((3.0, 1.0), 0), ((1.0, 3.0), 1), ((1.0, 3.0, 3.0), 1)])
def test_two_draws_are_the_first_two_whatever_else_was_drawn(data: Data, rewards: Sequence[float], chosen: int) -> None:
    assert data.candidates("preference", drawn("r", rewards)) == [[chosen, 1 - chosen]]
    (pair,) = data.load("preference", texts("t", rewards))
    encoded = [tuple(data.tokenizer.encode_completion(text, prompt="x")) for text in (GOOD, BAD)]
    assert pair.candidates == (encoded[chosen], encoded[1 - chosen])
    assert pair.rewards == (rewards[chosen], rewards[1 - chosen])


def test_best_and_worst_are_the_first_of_equals(data: Data) -> None:
    assert data.candidates("preference", drawn("r", (2.0, -1.0, 2.0, -1.0)), **ALL) == [[0, 1]]


def test_digests_of_what_an_earlier_version_read_stay(data: Data) -> None:
    """Printed by the version that always took best and worst: with the option, and with all candidates, it goes on."""
    rows = [drawn(f"r{i}", [0.5, -1.0 + i, 2.0, -3.0], None) for i in range(3)]
    for i, row in enumerate(rows):
        row["prompt_ids"] = [1, 5 + i]
        for k, candidate in enumerate(row["candidates"]):
            candidate["token_ids"] = [9, 20 + k + i, 2]
    assert data_digest(data.load("preference", *rows, **ALL)) == (
        "0c81f52d9fe355b71b0e35eaedb73e0554ef816ba9a67c27cb838c50d95466ad"
    )
    for candidates in (None, 4):
        assert data_digest(data.load("rewards", *rows, candidates=candidates)) == (
            "9b6782b6bf6eff1c582a9f983d83ff14b661c3c1534741cd433b7ab571ee268e"
        )
    drawn_twice = data_digest(data.load("preference", *rows))
    assert drawn_twice != data_digest(data.load("preference", *rows, **ALL))
    two = [{**row, "candidates": row["candidates"][:2], "rewards": row["rewards"][:2]} for row in rows]
    assert data_digest(data.load("preference", *two, **ALL)) == data_digest(data.load("preference", *two))


class TestOnlyWhatIsUsedIsChecked:
    def test_lengths(self, data: Data) -> None:
        """Candidate k has k + 2 tokens: those that are in no group may be of any length."""
        row, limits = drawn("r", REWARDS), {"max_completion_tokens": 3}
        assert data.candidates("rewards", row, candidates=2, limits=limits) == [[0, 1]]
        assert data.candidates("preference", row, limits=limits) == [[1, 0]]
        with pytest.raises(DataError, match=r"'candidates\[2\]' of record 'r' has 4 tokens"):
            data.load("rewards", row, candidates=3, limits=limits)
        with pytest.raises(DataError, match=r"'candidates\[3\]' of record 'r' has 5 tokens"):
            data.load("preference", row, limits={"max_completion_tokens": 4}, **ALL)
        long = texts("t", [0.0, 1.0, 2.0])
        length = max(len(data.tokenizer.encode_completion(text, prompt="x")) for text in (GOOD, BAD))
        assert len(data.load("preference", long, limits={"max_completion_tokens": length})) == 1
        with pytest.raises(DataError, match=r"'completions\[2\]' of record 't'"):
            data.load("rewards", long, limits={"max_completion_tokens": length})

    def test_stored_logprobs(self, data: Data) -> None:
        row = drawn("r", REWARDS)
        row["candidates"][2]["token_ids"] = [7, 7]
        for settings in ({"purpose": "rewards", "candidates": 2}, {"purpose": "preference"}):
            assert data.load(settings.pop("purpose"), row, logprobs=WANTED, **settings)
        with pytest.raises(DataError, match=r"prompt or candidates\[2\] were changed"):
            data.load("preference", row, logprobs=WANTED, **ALL)

    def test_log_probs_of_tokens(self, data: Data) -> None:
        row = drawn("r", REWARDS)
        row["behaviour_token_logprobs"][3] = [0.0]
        assert data.load("rewards", row, candidates=3, loss=EVERYTHING)
        with pytest.raises(DataError, match=r"'behaviour_token_logprobs\[3\]' has 1 values; expected 5"):
            data.load("preference", row, loss=EVERYTHING, **ALL)
        row["log_weights"].pop()
        with pytest.raises(DataError, match=r"'log_weights' has 3 values; expected 4"):
            data.load("rewards", row, candidates=2, loss=EVERYTHING)


class TestTies:
    ROWS = (drawn("a", (1, 1, 3)), drawn("b", (2, 1, 3)), texts("c", [5, 5]), texts("d", [6, 5]))

    def test_an_error_by_default_that_names_the_options(self, data: Data) -> None:
        with pytest.raises(TieError) as error:
            data.load("preference", *self.ROWS)
        assert str(error.value) == (
            f"{data.path}:1: the first two candidates of record 'a' have reward 1.0, so none is preferred (of 4 "
            "records 2 cannot be used: 2 equal rewards); expected different rewards for a preference loss; fix: set "
            "ties=skip to leave such records out, set pairs=best_and_worst to choose among all candidates, or use a "
            "loss.kind for which equal rewards are legitimate: exo_rw or dpo_rw"
        )
        with pytest.raises(
            TieError, match=r":3: all candidates of record 'c' have reward 5.0.*; fix: set ties=skip to"
        ):
            data.load("preference", *self.ROWS, **ALL)
        with pytest.raises(TieError, match=r"record 'p' are the same text; .*; fix: set ties=skip to leave"):
            data.load("preference", {"id": "p", "prompt": "It", "chosen": GOOD, "rejected": GOOD})

    def test_left_out_on_request_and_told(self, data: Data) -> None:
        found = data.load("preference", *self.ROWS, ties="skip")
        assert [each.id for each in found] == ["b", "d"]
        told = f"4 records left out: equal rewards (the first: {data.path}:"
        assert data.lines[-1].startswith(f"data: 2 of {told}1: the first two candidates of record 'a' have reward 1.0")
        found = data.load("preference", *self.ROWS, ties="skip", **ALL)
        assert [each.id for each in found] == ["a", "b", "d"]
        (line,) = data.lines
        assert line.startswith(f"data: 1 of {told}3: all candidates of record 'c'")
        assert len(data.load("preference", self.ROWS[1], self.ROWS[3], ties="skip", candidates=2)) == 2
        assert not any("left out" in line for line in data.lines)

    def test_equal_texts_are_left_out_too(self, data: Data) -> None:
        same = {"id": "p", "prompt": "It", "chosen": GOOD, "rejected": GOOD}
        found = data.load("preference", same, {**same, "id": "q", "rejected": BAD}, ties="skip")
        assert [each.id for each in found] == ["q"]
        twice = {**texts("t", [0, 1]), "completions": [GOOD, GOOD]}
        assert [each.id for each in data.load("preference", twice, texts("u", [0, 1]), ties="skip")] == ["u"]
        assert data.lines[-1].startswith("data: 1 of 2 records left out: equal pair (the first: ")

    def test_no_pair_remains(self, data: Data) -> None:
        with pytest.raises(DataError, match=rf"{data.path}: has no record that can be used: 2 equal rewards"):
            data.load("preference", self.ROWS[0], self.ROWS[2], ties="skip")

    def test_other_flaws_are_errors_still(self, data: Data) -> None:
        with pytest.raises(DataError, match=r":2: .*has 1 candidate .*1 equal rewards, 1 malformed"):
            data.load("preference", self.ROWS[0], drawn("x", (1,)), ties="skip")
        with pytest.raises(DataError, match=r"'rewards\[0\]' is nan"):
            data.load("preference", self.ROWS[1], drawn("x", (float("nan"), 1.0)), ties="skip")

    def test_fields_of_single_tokens_are_compared_among_what_remains(self, data: Data) -> None:
        rows = [drawn("a", (1, 1)), drawn("b", (2, 1)), drawn("c", (2, 1))]
        del rows[0]["reference_token_logprobs"]
        settings = {"loss": EVERYTHING, "ties": "skip"}
        assert [each.id for each in data.load("preference", *rows, **settings)] == ["b", "c"]
        del rows[2]["reference_token_logprobs"]
        with pytest.raises(DataError, match=r":3: has no 'reference_token_logprobs', but .*:2 has"):
            data.load("preference", *rows, **settings)


@pytest.mark.parametrize(
    ("purpose", "settings", "message"),
    [
        ("rewards", ALL, "pairs: got 'best_and_worst', which has no effect: the loss compares rewards"),
        ("rewards", {"ties": "skip"}, "ties: got 'skip', which has no effect: the loss compares rewards"),
        ("preference", {"candidates": 3}, "candidates: got 3, but the loss compares two and pairs is two_draws"),
    ],
)
def test_settings_without_effect_are_refused(data: Data, purpose: str, settings: dict[str, Any], message: str) -> None:
    """Also for losses of the user's, of which the configuration does not know what they compare."""
    with pytest.raises(ConfigError, match=f"^{message}"):
        data.load(purpose, drawn("r", REWARDS), **settings)


def test_pairs_that_are_made_already_are_not_chosen_among(data: Data) -> None:
    made = {"id": "p", "prompt": "It", "chosen": GOOD, "rejected": BAD}
    assert len(data.load("preference", made, candidates=2)) == 1
    with pytest.raises(
        DataError, match=r":2: has 'chosen' and 'rejected', on which pairs=best_and_worst has no effect"
    ):
        data.load("preference", drawn("r", REWARDS), made, **ALL)


@pytest.mark.parametrize(
    ("purpose", "settings", "line"),
    [
        ("rewards", {"candidates": 2}, "the first 2 of 3 to 4 candidates in 2 of 3 records"),
        ("rewards", {}, None),
        ("preference", {}, "the first 2 of 3 to 4 candidates in 2 of 3 records"),
        ("preference", {**ALL, "candidates": 2}, "the first 2 of 3 to 4 candidates in 2 of 3 records"),
        ("preference", ALL, None),
    ],
)
def test_how_many_candidates_are_taken_is_told(
    data: Data, purpose: str, settings: dict[str, Any], line: str | None
) -> None:
    data.load(purpose, drawn("a", REWARDS), drawn("b", (0, 1)), texts("c", [0, 1, 2]), **settings)
    assert data.lines == ([] if line is None else [f"data: {line}"])


def test_how_many_candidates_are_taken_of_records_of_equal_size(data: Data) -> None:
    data.load("rewards", drawn("a", REWARDS), drawn("b", REWARDS), candidates=3)
    assert data.lines == ["data: the first 3 of 4 candidates in 2 records"]
    data.load("rewards", drawn("a", REWARDS), drawn("b", REWARDS), candidates=4)
    assert data.lines == []


def test_too_few_candidates(data: Data) -> None:
    for settings in ({}, ALL):
        purpose = "preference" if settings else "rewards"
        with pytest.raises(DataError) as error:
            data.load(purpose, drawn("a", REWARDS), drawn("b", (0, 1)), candidates=3, **settings)
        assert str(error.value) == (
            f"{data.path}:2: record 'b' has 2 candidates; expected at least 3 (candidates); "
            "fix: lower `candidates`, or leave it out to take all that a record has"
        )


class TestTemperature:
    """The sampling temperature of the records against that of the loss."""

    WARM = LogprobSource("a1" * 32, 1.0, "bf16")
    MEANING = (
        "their candidates are not draws of the reference that the loss compares with, which the paper's theorems "
        "assume, and stored log-probs are not used; to make them agree, "
    )

    def told(self, data: Data, *rows: Row, temperature: float = 0.8) -> list[str]:
        data.load("rewards", *rows, temperature=temperature)
        return data.lines

    def test_of_the_records(self, data: Data) -> None:
        assert self.told(data, drawn("a", (0, 1)), drawn("b", (0, 1))) == []
        warm = [drawn(name, (0, 1), self.WARM) for name in "ab"]
        assert self.told(data, *warm) == [
            "data: 2 of 2 records were drawn at temperature 1.0, but loss.temperature is 0.8: "
            f"{self.MEANING}set loss.temperature=1.0, or draw candidates with sampling.temperature=0.8"
        ]
        assert self.told(data, *warm, temperature=1.0) == []

    def test_of_several_rollouts(self, data: Data) -> None:
        """One setting of the loss cannot fit all."""
        rows = [drawn("a", (0, 1)), drawn("b", (0, 1), self.WARM), texts("t", [0, 1])]
        assert self.told(data, *rows) == [
            "data: 1 of 2 records were drawn at temperature 1.0, but loss.temperature is 0.8: "
            f"{self.MEANING}draw candidates with sampling.temperature=0.8"
        ]
        (line,) = self.told(data, *rows, temperature=0.5)
        assert "2 of 2 records were drawn at temperature 0.8 or 1.0, but loss.temperature is 0.5" in line

    def test_of_the_rollout_beside_the_data(self, data: Data) -> None:
        """It describes records that do not say it themselves, in the file or in its directory."""
        bare, own = drawn("a", (0, 1), None), drawn("b", (0, 1))
        assert self.told(data, bare) == []
        beside = data.path.parent / "rollout.json"
        beside.write_text(json.dumps({"temperature": 1.0}))
        assert "1 of 2 records were drawn at temperature 1.0" in self.told(data, bare, own)[0]
        assert self.told(data, own) == []
        assert self.told(data, texts("t", [0, 1])) == [], "it says nothing of completions"
        for nothing in ('{"checkpoint": "x"}', "[1]", "{", '{"temperature": "1.0"}'):
            beside.write_text(nothing)
            assert self.told(data, bare) == []
        beside.write_text(json.dumps({"temperature": 1.0}))
        data.path.rename(data.path.parent / "candidates.jsonl")
        lines: list[str] = []
        config = DataConfig(path=str(data.path.parent))
        load_groups(config, data.tokenizer, purpose="rewards", temperature=0.8, tell=lines.append)
        assert len(lines) == 3
