"""Rewards from a function: what it is called with, what it may return, what its mistakes look like."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import wraps
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from exo_megatron.errors import RewardError, TryAgainLater
from exo_megatron.rewards.function import FunctionReward, load_reward_function, read_parameters
from tests.reference.completions import completions

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
    assert source.score(completions(["ab", "a"], ["xyz", ""])) == [2.3, 1.0]


@pytest.mark.parametrize("answer", [(1, 2.5), np.array([1, 2.5], dtype=np.float32), torch.tensor([1.0, 2.5])])
def test_any_sequence_of_numbers_will_do(answer: object) -> None:
    rewards = FunctionReward(lambda prompts, texts: answer, "f").score(completions(["p", "p"], ["a", "b"]))
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
        FunctionReward(lambda prompts, texts: answer, "f").score(completions(["p", "p"], ["first", "second"]))
    assert caught.value.problem == problem


def test_an_exception_is_told_with_its_place() -> None:
    def fails(prompts: object, completions: object) -> list[float]:
        raise KeyError("weight")

    with pytest.raises(RewardError) as caught:
        FunctionReward(fails, "m:fails").score(completions(["p"], ["c"]))
    assert "raised KeyError: 'weight'" in caught.value.problem
    assert f"{__file__}:{fails.__code__.co_firstlineno + 1}" in caught.value.problem


class Panic(BaseException):
    """As pyo3 raises for a panic in Rust."""


@pytest.mark.parametrize(
    ("error", "problem"),
    [(SystemExit(0), "called sys.exit(0)"), (SystemExit(), "called sys.exit(None)"), (Panic("at line 1"), "Panic: at")],
    ids=["exit 0", "exit", "panic"],
)
def test_a_function_or_module_cannot_end_the_stage(
    error: BaseException, problem: str, user_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaves(prompts: object, completions: object) -> list[float]:
        raise error

    with pytest.raises(RewardError) as caught:
        FunctionReward(leaves, "m:leaves").score(completions(["p"], ["c"]))
    assert problem in caught.value.problem and f"{__file__}:" in caught.value.problem
    monkeypatch.setitem(sys.modules, "holder", SimpleNamespace(error=error))  # type: ignore[arg-type]
    (user_directory / "leaver.py").write_text("import holder\nraise type(holder.error)(*holder.error.args)\n")
    with pytest.raises(RewardError) as caught:
        load_reward_function("leaver:f")
    assert problem in caught.value.problem and "leaver.py:2" in caught.value.problem


def test_answers_without_an_end_are_refused() -> None:
    with pytest.raises(RewardError, match="returned 3 rewards for 2 completions"):
        FunctionReward(lambda prompts, texts: repeat(1.0), "f").score(completions(["p", "p"], ["a", "b"]))


def test_errors_of_ours_pass_through() -> None:
    def endpoint_down(prompts: object, completions: object) -> list[float]:
        raise TryAgainLater("http://judge", "is down", expected="an answer", fix="wait")

    with pytest.raises(TryAgainLater):
        FunctionReward(endpoint_down, "f").score(completions(["p"], ["c"]))


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


MESSAGES = [[{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]] * 2


def called_with(function: Any, **columns: Any) -> dict[str, Any]:
    """What `function`, which returns its arguments by name, was given."""
    given: dict[str, Any] = {}

    @wraps(function)  # inspect.signature then shows that of `function`
    def recorder(*positional: Any, **named: Any) -> list[float]:
        given.update(function(*positional, **named))
        return [0.0, 0.0]

    FunctionReward(recorder, "f").score(completions(["p", "q"], ["a", "b"], **columns))
    return given


TEXTS = {"prompts": ["p", "q"], "completions": ["a", "b"]}


def test_further_parameters_are_columns() -> None:
    def judge(prompts: Any, completions: Any, answer: Any, *, messages: Any, scale: Any = 3) -> dict[str, Any]:
        return locals()

    given = called_with(judge, answer=[2, 3], other=["x", "y"], messages=MESSAGES)
    assert given == TEXTS | {"answer": [2, 3], "messages": MESSAGES, "scale": 3}
    given = called_with(judge, answer=[2, 3], scale=[4, 5], messages=MESSAGES)
    assert given == TEXTS | {"answer": [2, 3], "messages": MESSAGES, "scale": [4, 5]}


def test_kwargs_are_all_columns_with_none_where_a_record_has_none() -> None:
    def judge(prompts: Any, completions: Any, answer: Any, **kwargs: Any) -> dict[str, Any]:
        return locals()

    given = called_with(judge, answer=[2, 3], other=["x", None], prompts=["taken", "taken"], messages=MESSAGES)
    assert given == TEXTS | {"answer": [2, 3], "kwargs": {"other": ["x", None]}}


def test_the_names_of_the_first_two_are_free() -> None:
    assert called_with(lambda x, y: locals(), x=[1, 2]) == {"x": ["p", "q"], "y": ["a", "b"]}
    assert called_with(lambda x, completions: locals()) == {"x": ["p", "q"], "completions": ["a", "b"]}


def test_functions_for_trl_get_prompts_and_completions_by_name() -> None:
    """Or `completions` would be the prompts and `answer` the completions, without a word."""
    assert called_with(lambda completions, answer: locals(), answer=[2, 3]) == {
        "completions": ["a", "b"],
        "answer": [2, 3],
    }
    given = called_with(lambda completions, **kwargs: locals(), answer=[2, 3])
    assert given == {"completions": ["a", "b"], "kwargs": {"prompts": ["p", "q"], "answer": [2, 3]}}


@pytest.mark.parametrize("columns", [{"answer": [2, None], "other": [1, 1]}, {"other": [1, 1]}])
def test_a_column_that_a_record_lacks_is_named(columns: Any) -> None:
    def judge(prompts: Any, completions: Any, answer: Any) -> dict[str, Any]:
        return locals()

    with pytest.raises(RewardError) as caught:
        called_with(judge, **columns)
    assert caught.value.where == ("record 'r1', candidate 0" if "answer" in columns else "record 'r0', candidate 0")
    assert caught.value.problem == "has no column 'answer' (columns: other)"


def test_messages_that_a_record_lacks_are_named() -> None:
    with pytest.raises(RewardError, match="record 'r1', candidate 0: has no messages"):
        called_with(lambda prompts, completions, messages=None: locals(), messages=[MESSAGES[0], None])
    assert called_with(lambda prompts, completions, messages=None: locals()) == TEXTS | {"messages": None}


def test_a_function_without_a_signature_is_called_with_two_lists() -> None:
    assert read_parameters(map).columns == {}
    with pytest.raises(RewardError, match="returned a dict"):
        FunctionReward(lambda *texts: dict.fromkeys(texts[0]), "f").score(completions(["p"], ["c"], answer=[1]))
