"""Transformer Engine that is installed but cannot be used: a run goes on without it.

We use it for speed only: linears of half-precision weights and its fused optimizer kernels. Names
in checkpoints are the same without it. megatron-core, however, expects it to be either absent or
whole: it catches ImportError at most of the places where it imports it, and nothing else anywhere,
while compiled parts of another version of torch or CUDA raise AssertionError, OSError or
RuntimeError.
"""

from __future__ import annotations

import importlib
import sys

from exo_megatron.errors import reason

ENGINE = "transformer_engine"

_USERS = ("extensions.transformer_engine", "fp8_utils", "models.gpt", "optimizer", "distributed", "dist_checkpointing")
"""Modules of megatron.core that import it and that training needs."""


def settle_engine() -> str | None:
    """Import Transformer Engine and the megatron-core that uses it; without it if that fails.

    To be called before anything imports megatron-core. What fails may be Transformer Engine itself,
    or a part that this megatron-core wants and this version of it lacks. megatron-core then finds
    no Transformer Engine, as if it were not installed. Returns why it cannot be used, in one line;
    None if it can.
    """
    before = set(sys.modules)
    try:
        importlib.import_module(f"{ENGINE}.pytorch")
        users = [importlib.import_module(f"megatron.core.{name}") for name in _USERS]
        if not vars(users[0])["HAVE_TE"]:
            raise ImportError("megatron-core does not find the parts of it that it needs")
    except Exception as error:
        # A module that failed half-way, and those that saw one, must be imported anew.
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in (ENGINE, "megatron"):
                del sys.modules[name]
        sys.modules[ENGINE] = None  # type: ignore[assignment]  # importing it raises ModuleNotFoundError
        return f"{type(error).__name__}: {reason(error)}"
    return None
