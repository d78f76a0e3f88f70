"""Ranks tokenise data together: each shard once, and all of them read the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exo_megatron.config.sections import DataConfig
from exo_megatron.data import cache
from exo_megatron.data.dataset import load_groups
from exo_megatron.data.tokenizer import load_tokenizer
from tests.multiprocess.harness import Check, Outcome, run_checks
from tests.unit.data.tokenizers_made_here import sentencepiece_model

ENDS = ("good", "bad", "dull", "awful", "great", "really great", "not so dull")
ROWS = [{"prompt": "The movie", "chosen": f" was {end} .", "rejected": " was ."} for end in ENDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    sentencepiece_model(folder / "review.model")
    for name, rows in {"good": ROWS, "bad": [*ROWS[:3], {**ROWS[3], "chosen": ""}, *ROWS[4:]]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    checks = [
        Check(
            name,
            "tests.multiprocess.cache_checks:load",
            {"file": folder / f"{file}.jsonl", "tokenizer": folder / "review.model", "directory": folder / "cache"},
        )
        for name, file in {"first": "good", "second": "good", "bad": "bad"}.items()
    ]
    return run_checks(2, checks, folder / "checks")


def test_each_shard_is_made_once(outcomes: dict[str, Outcome], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = outcomes["first"].values()
    assert (first["made"], second["made"]) == (["1", "5"], ["3", "7"])
    monkeypatch.setattr(cache, "SHARD_RECORDS", 2)
    config = DataConfig(path=str(folder / "good.jsonl"), cache=folder / "alone")
    alone = load_groups(config, load_tokenizer(folder / "review.model"), purpose="preference")
    for rank in (first, second):
        assert rank["groups"] == list(alone) and rank["digest"] == alone.digest
    together, apart = (
        {path.relative_to(folder / name): path.read_bytes() for path in (folder / name).rglob("*.arrow")}
        for name in ("cache", "alone")
    )
    assert apart.items() <= together.items() and len(apart) == 4


def test_a_second_start_makes_none(outcomes: dict[str, Outcome]) -> None:
    for before, after in zip(outcomes["first"].values(), outcomes["second"].values(), strict=True):
        assert after == {**before, "made": []}


def test_all_ranks_tell_the_record_that_one_has_read(outcomes: dict[str, Outcome], folder: Path) -> None:
    errors = {rank["error"] for rank in outcomes["bad"].values()}
    assert len(errors) == 1 and errors.pop().startswith(f"{folder / 'bad.jsonl'}:4: 'chosen' is an empty completion")
