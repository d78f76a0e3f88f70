"""Rewards from a Python function of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, SupportsFloat, SupportsIndex

from exo_megatron.errors import ExoError, RewardError
from exo_megatron.rewards.source import Completion
from exo_megatron.utils.functions import load_user_function, raised

RewardFunction = Callable[..., object]

PROMPTS, COMPLETIONS = "prompts", "completions"
MESSAGES = "messages"
"""Name of the parameter that gets conversations."""


@dataclass(frozen=True)
class Parameters:
    """The arguments that a reward function wants.

    Attributes:
        names: of all its parameters.
        texts_by_name: whether it gets prompts and completions by these names and not as its first
            two arguments.
        columns: names of the columns that it gets, and whether it cannot do without.
        others: whether it gets all other columns, too.
    """

    names: frozenset[str]
    texts_by_name: bool
    columns: Mapping[str, bool]
    others: bool


def read_parameters(function: RewardFunction) -> Parameters:
    """Read the signature of a reward function.

    Prompts and completions are its first two arguments. Only where a parameter `completions` stands
    elsewhere, as in functions written for TRL, do both go by name.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # built-in functions may have no signature
        parameters = []
    by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_name = {p.name: p.default is p.empty for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    texts_by_name = COMPLETIONS in by_name and by_position[1:2] != [COMPLETIONS]
    texts = [PROMPTS, COMPLETIONS] if texts_by_name else by_position[:2]
    return Parameters(
        names=frozenset(p.name for p in parameters),
        texts_by_name=texts_by_name,
        columns={name: required for name, required in by_name.items() if name not in texts},
        others=any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


class FunctionReward:
    """A reward source that calls `function(prompts, completions)` for one number per candidate.

    Both arguments are lists of strings, of equal length. Further parameters of the function are
    names of columns and get lists with a value for every completion; `messages` gets the
    conversations, and `**kwargs` all other columns. The function may return a list, a tuple, a
    numpy array or a tensor. `name` is used in error messages.
    """

    def __init__(self, function: RewardFunction, name: str) -> None:
        self._function = function
        self._name = name
        self._parameters = read_parameters(function)

    def score(self, completions: Sequence[Completion]) -> list[float]:
        """Call the function.

        Raises RewardError if a record lacks a column that it asks for, if it fails, or if it does
        not return one number per candidate.
        """
        texts = [each.text for each in completions]
        positional, named = self._arguments(completions)
        try:
            answer = self._function(*positional, **named)
        except (ExoError, KeyboardInterrupt):
            raise
        # The user's function may raise anything; the message says where.
        except BaseException as error:
            raise self._error(
                raised(error), "a function that judges every completion", "correct the function"
            ) from error
        values = self._listed(answer, len(texts) + 1)
        if len(values) != len(texts):
            raise self._error(
                f"returned {len(values)} rewards for {len(texts)} completions",
                "one reward per completion",
                "return one number for every completion, in order",
            )
        return [self._number(value, text) for value, text in zip(values, texts, strict=True)]

    def _arguments(self, completions: Sequence[Completion]) -> tuple[list[list[str]], dict[str, list[Any]]]:
        """Return the arguments of the call, by position and by name."""
        wanted = self._parameters
        texts = {PROMPTS: [each.prompt for each in completions], COMPLETIONS: [each.text for each in completions]}
        named: dict[str, list[Any]] = {}
        if wanted.texts_by_name:
            named |= {name: values for name, values in texts.items() if name in wanted.names or wanted.others}
        present = completions[0].columns.keys() if completions else {}
        for name, required in wanted.columns.items():
            known = any(each.chat for each in completions) if name == MESSAGES else name in present
            if required or known:
                named[name] = [_column(each, name) for each in completions]
        if wanted.others:
            taken = {*wanted.names, *named}
            named |= {name: [each.columns[name] for each in completions] for name in present if name not in taken}
        return [] if wanted.texts_by_name else list(texts.values()), named

    def _listed(self, answer: object, limit: int) -> list[object]:
        # A dict, a set or a string can be iterated, too, but has no order or no numbers.
        if isinstance(answer, Iterable) and not isinstance(answer, str | bytes | dict | set):
            # What has no length may have no end.
            return list(answer if isinstance(answer, Sized) else islice(answer, limit))
        raise self._error(
            f"returned a {type(answer).__name__}", "a list of numbers", "return one number for every completion"
        )

    def _number(self, value: object, text: str) -> float:
        # Numbers of numpy and torch convert to float. A string may convert, too, but is a mistake.
        if isinstance(value, SupportsFloat | SupportsIndex) and not isinstance(value, bool):
            with suppress(TypeError, ValueError):
                return float(value)
        raise self._error(f"returned {value!r} for the completion {shorten(text)}", "a number", "correct the function")

    def _error(self, problem: str, expected: str, fix: str) -> RewardError:
        return RewardError(f"reward.function {self._name}", problem, expected=expected, fix=fix)


def _column(completion: Completion, name: str) -> Any:
    """Return the value of a column. Raises RewardError if the completion's record has none."""
    if name == MESSAGES:
        if completion.chat is not None:
            return [dict(message) for message in completion.chat.messages]
        raise RewardError(
            completion.where,
            "has no messages",
            expected="a prompt of chat messages, because the reward function has a parameter 'messages'",
            fix="write the prompts as messages, or use prompts and completions",
        )
    value = completion.columns.get(name)
    if value is None:
        has = ", ".join(sorted(key for key, found in completion.columns.items() if found is not None))
        raise RewardError(
            completion.where,
            f"has no column {name!r} (columns: {has or 'none'})",
            expected=f"a JSON value for the parameter {name!r} of the reward function",
            fix="add the column to the data that `rollout` or `score` reads, or correct the function",
        )
    return value


def load_reward_function(name: str) -> FunctionReward:
    """Import `package.module:function`. Raises RewardError if it cannot be imported."""
    return FunctionReward(load_user_function("reward.function", name, RewardError), name)


def shorten(text: str, limit: int = 60) -> str:
    """Show a text in quotes in a one-line message, cut to `limit` characters."""
    return repr(text if len(text) <= limit else f"{text[:limit]}...")
