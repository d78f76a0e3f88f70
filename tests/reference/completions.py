"""Completions as reward sources get them, from plain lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exo_megatron.data.text import Chat
from exo_megatron.rewards.source import Completion


def completions(prompts: Sequence[str], texts: Sequence[str], /, **columns: Sequence[Any]) -> list[Completion]:
    """One completion per text, with the values of `columns`; "messages" is no column but the conversations."""
    messages = columns.pop("messages", [None] * len(texts))
    return [
        Completion(
            f"record 'r{i}', candidate 0",
            prompts[i],
            texts[i],
            None if messages[i] is None else Chat(tuple(messages[i])),
            {name: values[i] for name, values in columns.items()},
        )
        for i in range(len(texts))
    ]
