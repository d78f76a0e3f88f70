"""The user's functions, named as `package.module:name` in a configuration."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from exo_megatron.errors import ExoError


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
    except ExoError:
        raise
    # The user's module may raise any exception while it is imported.
    except Exception as error:
        raise error_class(
            where,
            f"importing {module_name} raised {type(error).__name__}: {error} (in {innermost_frame(error)})",
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


def innermost_frame(error: BaseException) -> str:
    """Name the file and line where an exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown place"
