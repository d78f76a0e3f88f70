"""The user's functions, named as `package.module:name` in a configuration."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from exo_megatron.errors import ExoError, reason


def load_user_function(key: str, name: str, error_class: type[ExoError]) -> Callable[..., Any]:
    """Import `package.module:name` from an installed package or the current directory.

    `key` is the configuration key, for messages. Raises `error_class` if the module cannot be
    imported or has no such function.
    """
    where = f"{key} {name}"
    module_name, _, function_name = name.partition(":")
    # `python -m exo_megatron` imports from the current directory; so should the console script.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (ExoError, KeyboardInterrupt):
        raise
    # The user's module may raise anything while it is imported, sys.exit among it.
    except BaseException as error:
        raise error_class(
            where,
            f"importing {module_name} {raised(error)}",
            expected="a module that can be imported",
            fix="correct the name or the module, or add its directory to PYTHONPATH",
        ) from error
    function: object = vars(module).get(function_name)
    if not callable(function):
        raise error_class(
            where,
            f"{module.__file__} has no function {function_name!r}",
            expected="a function of the module",
            fix="correct the name after the colon",
        )
    return function


def raised(error: BaseException) -> str:
    """Say in one line what a user's code raised, and where. An exit is no end of our process, whatever its code."""
    text = f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"raised {_named(error)}"
    return f"{text} (in {innermost_frame(error)})"


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {reason(error)}" if str(error).strip() else type(error).__name__


def innermost_frame(error: BaseException) -> str:
    """Name the file and line where an exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown place"
