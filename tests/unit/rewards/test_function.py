"""Rewards from a function: what it is called with, what it may return, what its mistakes look like."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from exo_megatron.errors import RewardError, TryAgainLater
from exo_megatron.rewards.function import FunctionReward, load_reward_function

MODULE = """
def length(prompts, completions):
    return [len(prompt) + len(completion) / 10 for prompt, completion in zip(prompts, completions)]

number = 3
"""


@pytest.fixture
def user_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory with modules of a user's, which Python has not seen before."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_function_of_a_package_below_the_current_directory(user_directory: Path) -> None:
    (user_directory / "my_rewards").mkdir()
    (user_directory / "my_rewards" / "by_length.py").write_text(MODULE)
    source = load_reward_function("my_rewards.by_length:length")
    assert source.score(["ab", "a"], ["xyz", ""]) == [2.3, 1.0]


@pytest.mark.parametrize("answer", [(1, 2.5), np.array([1, 2.5], dtype=np.float32), torch.tensor([1.0, 2.5])])
def test_any_sequence_of_numbers_will_do(answer: object) -> None:
    rewards = FunctionReward(lambda prompts, completions: answer, "f").score(["p", "p"], ["a", "b"])
    assert rewards == [1.0, 2.5]
    assert all(type(reward) is float for reward in rewards)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ([1.0], "returned 1 rewards for 2 completions"),
        (0.5, "returned a float"),
        ("ab", "returned a str"),
        ({"a": 1, "b": 2}, "returned a dict"),
        ([1.0, "2"], "returned '2' for the completion 'second'"),
        ([1.0, None], "returned None for the completion 'second'"),
        ([1.0, True], "returned True for the completion 'second'"),
    ],
)
def test_other_answers_are_refused(answer: object, problem: str) -> None:
    with pytest.raises(RewardError, match=r"reward\.function f") as caught:
        FunctionReward(lambda prompts, completions: answer, "f").score(["p", "p"], ["first", "second"])
    assert caught.value.problem == problem


def test_an_exception_is_told_with_its_place() -> None:
    def fails(prompts: object, completions: object) -> list[float]:
        raise KeyError("weight")

    with pytest.raises(RewardError) as caught:
        FunctionReward(fails, "m:fails").score(["p"], ["c"])
    assert "raised KeyError: 'weight'" in caught.value.problem
    assert f"{__file__}:{fails.__code__.co_firstlineno + 1}" in caught.value.problem


def test_errors_of_ours_pass_through() -> None:
    def endpoint_down(prompts: object, completions: object) -> list[float]:
        raise TryAgainLater("http://judge", "is down", expected="an answer", fix="wait")

    with pytest.raises(TryAgainLater):
        FunctionReward(endpoint_down, "f").score(["p"], ["c"])


def test_missing_module_function_and_broken_module(user_directory: Path) -> None:
    (user_directory / "lengths.py").write_text(MODULE)
    (user_directory / "broken.py").write_text("import lengths\n\nlengths.nothing()\n")
    with pytest.raises(RewardError, match="ModuleNotFoundError: No module named 'no_such_module'"):
        load_reward_function("no_such_module:f")
    for name in ("width", "number"):
        with pytest.raises(RewardError, match=f"lengths.py has no function '{name}'"):
            load_reward_function(f"lengths:{name}")
    with pytest.raises(RewardError, match=r"broken\.py:3"):
        load_reward_function("broken:f")
