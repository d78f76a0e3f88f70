"""Rewards from a Python function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import SupportsFloat, SupportsIndex

from exo_megatron.errors import ExoError, RewardError
from exo_megatron.utils.functions import innermost_frame, load_user_function

RewardFunction = Callable[[Sequence[str], Sequence[str]], object]


class FunctionReward:
    """A reward source that calls `function(prompts, completions)` for one number per candidate.

    Both arguments are lists of equal length. The function may return a list, a tuple, a numpy array
    or a tensor. `name` is used in messages.
    """

    def __init__(self, function: RewardFunction, name: str) -> None:
        self._function = function
        self._name = name

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Call the function.

        Raises RewardError if the function fails or does not return one number per candidate.
        """
        try:
            answer = self._function(list(prompts), list(completions))
        except ExoError:
            raise
        # The user's function may raise any exception; the message says where.
        except Exception as error:
            raise self._error(
                f"raised {type(error).__name__}: {error} (in {innermost_frame(error)})",
                "a function that judges every completion",
                "correct the function",
            ) from error
        values = self._listed(answer)
        if len(values) != len(completions):
            raise self._error(
                f"returned {len(values)} rewards for {len(completions)} completions",
                "one reward per completion",
                "return one number for every completion, in order",
            )
        return [self._number(value, index, completions) for index, value in enumerate(values)]

    def _listed(self, answer: object) -> list[object]:
        # A dict, a set or a string can be iterated, too, but has no order or no numbers.
        if isinstance(answer, Iterable) and not isinstance(answer, str | bytes | dict | set):
            return list(answer)
        raise self._error(
            f"returned a {type(answer).__name__}", "a list of numbers", "return one number for every completion"
        )

    def _number(self, value: object, index: int, completions: Sequence[str]) -> float:
        # Numbers of numpy and torch convert to float. A string may convert, too, but is a mistake.
        if isinstance(value, SupportsFloat | SupportsIndex) and not isinstance(value, bool):
            with suppress(TypeError, ValueError):
                return float(value)
        raise self._error(
            f"returned {value!r} for the completion {shorten(completions[index])}", "a number", "correct the function"
        )

    def _error(self, problem: str, expected: str, fix: str) -> RewardError:
        return RewardError(f"reward.function {self._name}", problem, expected=expected, fix=fix)


def load_reward_function(name: str) -> FunctionReward:
    """Import `package.module:function`. Raises RewardError if it cannot be imported."""
    return FunctionReward(load_user_function("reward.function", name, RewardError), name)


def shorten(text: str, limit: int = 60) -> str:
    """Show a text in quotes in a one-line message, cut to `limit` characters."""
    return repr(text if len(text) <= limit else f"{text[:limit]}...")
