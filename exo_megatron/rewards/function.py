"""Rewards from a Python function of the user's."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import ModuleType
from typing import SupportsFloat, SupportsIndex

from exo_megatron.errors import ExoError, RewardError

RewardFunction = Callable[[Sequence[str], Sequence[str]], object]


class FunctionReward:
    """Calls `function(prompts, completions)`, two lists of equal length, for one number per completion.

    The answer may be a list, a tuple, a numpy array or a tensor. name: for messages.
    """

    def __init__(self, function: RewardFunction, name: str) -> None:
        self._function = function
        self._name = name

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Call the function. Raises RewardError if it fails or its answer is not one number per completion."""
        try:
            answer = self._function(list(prompts), list(completions))
        except ExoError:
            raise
        # A function of the user's may raise anything; what helps is where.
        except Exception as error:
            raise self._error(
                f"raised {type(error).__name__}: {error} (in {_innermost(error)})",
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
        # A dict, a set or a string can be iterated too, but has no order or no numbers.
        if isinstance(answer, Iterable) and not isinstance(answer, str | bytes | dict | set):
            return list(answer)
        raise self._error(
            f"returned a {type(answer).__name__}", "a list of numbers", "return one number for every completion"
        )

    def _number(self, value: object, index: int, completions: Sequence[str]) -> float:
        # Numbers of numpy and torch convert themselves; a string would convert too, but is a mistake.
        if isinstance(value, SupportsFloat | SupportsIndex) and not isinstance(value, bool):
            with suppress(TypeError, ValueError):
                return float(value)
        raise self._error(
            f"returned {value!r} for the completion {shorten(completions[index])}", "a number", "correct the function"
        )

    def _error(self, problem: str, expected: str, fix: str) -> RewardError:
        return RewardError(f"reward.function {self._name}", problem, expected=expected, fix=fix)


def load_function(name: str) -> FunctionReward:
    """Import `package.module:function`, from installed packages or from below the current directory.

    Raises RewardError if the module cannot be imported or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    module = _import(module_name, name)
    function: object = vars(module).get(function_name)
    if not callable(function):
        raise RewardError(
            f"reward.function {name}",
            f"{module.__file__} has no function {function_name!r}",
            expected="a function of the module, called with (prompts, completions)",
            fix="correct the name after the colon",
        )
    return FunctionReward(function, name)


def shorten(text: str, limit: int = 60) -> str:
    """A text in quotes for a one-line message."""
    return repr(text if len(text) <= limit else f"{text[:limit]}...")


def _import(module: str, name: str) -> ModuleType:
    # `python -m exo_megatron` can import from the current directory; the console script should not differ.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module)
    # A module of the user's may raise anything while it is imported.
    except Exception as error:
        raise RewardError(
            f"reward.function {name}",
            f"importing {module} raised {type(error).__name__}: {error} (in {_innermost(error)})",
            expected="a module that can be imported",
            fix="correct the name or the module, or add its directory to PYTHONPATH",
        ) from error


def _innermost(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown place"
