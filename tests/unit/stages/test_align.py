"""What `align` asks of its data, and what it says about them before a model is built."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exo_megatron.config.stages import AlignConfig
from exo_megatron.data.groups import Group
from exo_megatron.data.tokenizer import load_tokenizer
from exo_megatron.errors import ConfigError
from exo_megatron.losses.objective import LossInputs
from exo_megatron.stages import align
from tests.reference.tiny_llama import tiny_tokenizer
from tests.unit.conftest import LoneRuntime, Rank

SOURCE = {"fingerprint": "f", "temperature": 1.0, "precision": "bf16"}


class GroupsRead(Exception):
    """Raised in place of the checks that follow the reading."""


def own_loss(inputs: LossInputs) -> Any:
    return inputs.log_ratio.sum(dim=-1)


def record(name: str, rewards: Sequence[float]) -> dict[str, Any]:
    candidates = [
        {"text": "x", "token_ids": [20 + k, 2], "finished": True, "logprob": -1.0, "logprob_digest": "d"}
        for k in range(len(rewards))
    ]
    return {
        "id": name, "prompt": "p", "prompt_ids": [1, 5], "candidates": candidates, "rewards": rewards,
        "logprob_source": SOURCE,
    }  # fmt: skip


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The groups that `align` reads with these settings."""
    found: list[Sequence[Group]] = []

    def stop(groups: Sequence[Group], *rest: object) -> None:
        found.append(groups)
        raise GroupsRead

    policy = SimpleNamespace(path=tmp_path, fingerprint="f", spec=None)
    monkeypatch.setattr(align, "find_policy_and_reference", lambda *given: (policy, policy))
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(align, "find_tokenizer", lambda *given: load_tokenizer(tmp_path / "tokenizer"))
    monkeypatch.setattr(align, "check_groups", stop)
    rows = [record("a", [0.0, 1.0, 5.0]), record("b", [1.0, 1.0, 2.0])]
    (tmp_path / "candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read(runtime: Any = None, **settings: Any) -> list[list[int]]:
        base = {"output": tmp_path / "out", "model": {"checkpoint": "m"}, "data": {"path": str(tmp_path)}}
        config = AlignConfig.model_validate({**base, "reference_logprobs": "computed", **settings})
        with pytest.raises(GroupsRead):
            align.run_align(config, runtime or LoneRuntime())
        return [[y[0] - 20 for y in group.candidates] for group in found.pop()]

    return read


def test_the_keys_about_candidates_reach_the_data(groups: Any) -> None:
    assert groups(loss={"kind": "exo_rw"}) == [[0, 1, 2], [0, 1, 2]]
    assert groups(loss={"kind": "exo_rw"}, candidates=2) == [[0, 1], [0, 1]]
    assert groups(loss={"kind": "exo_pref"}, ties="skip") == [[1, 0]]
    assert groups(loss={"kind": "exo_pref"}, pairs="best_and_worst") == [[2, 0], [2, 0]]
    assert groups(loss={"kind": "exo_pref"}, pairs="best_and_worst", candidates=2, ties="skip") == [[1, 0]]


def test_what_is_special_about_the_data_is_told_once(groups: Any, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"loss": {"kind": "exo_pref", "temperature": 0.8}, "ties": "skip"}
    groups(**settings)
    lines = capsys.readouterr().out.splitlines()
    taken_for, first, *lines = lines
    assert taken_for.endswith("as stored candidates (candidates, logprob_source, prompt, prompt_ids, rewards)")
    assert first.startswith("data: the first is ")
    assert [line.split(" ", 4)[:4] for line in lines] == [
        ["data:", "2", "of", "2"],
        ["data:", "the", "first", "2"],
        ["data:", "1", "of", "2"],
    ]
    assert "drawn at temperature 1.0, but loss.temperature is 0.8" in lines[0]
    groups(Rank(rank=1), **settings)
    assert capsys.readouterr().out == "", "rank 0 alone says it"
    groups(loss={"kind": "exo_rw", "temperature": 1.0}, reference_logprobs="live")
    assert len(capsys.readouterr().out.splitlines()) == 2, "what the file was taken for, and the first record"


def test_options_of_pairs_with_a_loss_of_the_users_that_compares_rewards(groups: Any) -> None:
    with pytest.raises(ConfigError, match="ties: got 'skip', which has no effect"):
        groups(loss={"function": f"{__name__}:own_loss"}, ties="skip")
