"""Rows of data as files, and how a stage loads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from exo_megatron.config.sections import DataConfig
from exo_megatron.data.dataset import DATA_REPORT, load_groups, load_prompts
from exo_megatron.data.prepared import PreparedGroups
from exo_megatron.data.tokenizer import Tokenizer
from exo_megatron.errors import DataError

GOOD, BAD, DULL = " was good .", " was bad .", " is not so dull ."
LONG = " was really great and not so dull" * 6
LIMITS = {"max_prompt_tokens": 8, "max_completion_tokens": 12}

Row = dict[str, Any] | bytes


def pair(name: str, **fields: Any) -> Row:
    return {"id": name, "prompt": "The movie", "chosen": GOOD, "rejected": BAD, **fields}


def rewarded(name: str, *rewards: float, answers: tuple[str, ...] = (GOOD, BAD, DULL)) -> Row:
    return {"id": name, "prompt": "It", "completions": list(answers[: len(rewards)]), "rewards": list(rewards)}


@dataclass
class Loader:
    """Loads rows of a file in a directory; `told` are the lines of the last load."""

    directory: Path
    tokenizer: Tokenizer
    told: list[str] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.directory / "data.jsonl"

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.directory / DATA_REPORT).read_text(encoding="utf-8"))

    def config(self, rows: list[Row], **settings: Any) -> DataConfig:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        self.file.write_bytes(b"".join(line + b"\n" for line in lines))
        return DataConfig(path=str(self.file), cache=self.directory / "cache", **settings)

    def groups(self, rows: list[Row], *, purpose: Any = "preference", ties: Any = "error", **data: Any):
        self.told.clear()
        config = self.config(rows, **data)
        return load_groups(
            config, self.tokenizer, purpose=purpose, ties=ties, tell=self.told.append, report=self.directory
        )

    def prompts(self, rows: list[Row], **data: Any):
        self.told.clear()
        return load_prompts(self.config(rows, **data), self.tokenizer, tell=self.told.append, report=self.directory)

    def error(self, load: Callable[..., object], rows: list[Row], **settings: Any) -> DataError:
        with pytest.raises(DataError) as error:
            load(rows, **settings)
        assert "\n" not in str(error.value)
        return error.value

    def ids(self, completion: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode_completion(completion, prompt="x"))


def names(groups: PreparedGroups) -> list[str]:
    return [group.id for group in groups]
