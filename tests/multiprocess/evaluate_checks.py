"""Checks of the evaluate stage that run inside a process group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exo_megatron.config.stages import EvaluateConfig, ImportConfig
from exo_megatron.errors import ExoError
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.stages.evaluate import run_evaluate
from exo_megatron.stages.import_hf import run_import


def score(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The reward of these tests: words of the completion, and a little for those of the prompt."""
    return [len(c.split()) + len(p.split()) / 100 for p, c in zip(prompts, completions, strict=True)]


def convert(runtime: Runtime, *, hf: dict[str, Path], output: Path) -> None:
    for name, path in hf.items():
        run_import(ImportConfig(output=output / name, hf=path), runtime)


def evaluate(runtime: Runtime, *, config: dict[str, Any]) -> None:
    run_evaluate(EvaluateConfig(**config), runtime)


def refusals(runtime: Runtime, *, config: dict[str, Any], changes: list[dict[str, Any]]) -> list[str]:
    """The message of each refused configuration."""
    messages = []
    for change in changes:
        try:
            run_evaluate(EvaluateConfig(**{**config, **change}), runtime)
        except ExoError as error:
            messages.append(str(error))
    return messages
