"""What the worker processes of the tests of stored log-probs do. Run by tests/multiprocess/harness.py on every rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exo_megatron.config.stages import AlignConfig, ImportConfig, RolloutConfig, ScoreConfig
from exo_megatron.data import shards
from exo_megatron.data.groups import Group
from exo_megatron.errors import ExoError
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.stages.align import run_align
from exo_megatron.stages.import_hf import run_import
from exo_megatron.stages.rollout import run_rollout
from exo_megatron.stages.score import run_score
from exo_megatron.training import reference
from exo_megatron.utils.files import write_jsonl
from tests.reference.candidates import stored_lines


@dataclass(frozen=True)
class Trained:
    """metrics: of every step. scored: groups that went through a scoring pass."""

    metrics: list[dict[str, Any]]
    scored: int


def reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Different for nearly all candidates."""
    return [sum(map(ord, completion)) % 97 / 50 for completion in completions]


def prepare(
    runtime: Runtime,
    *,
    hf: dict[str, Path],
    rollouts: dict[str, dict[str, Any]],
    output: Path,
    edited: Path,
    per_shard: Sequence[int],
) -> None:
    """Import the models, draw and score candidates, and change a token of the second record of a copy.

    Candidates are scored once more in shards of `per_shard` prompts.
    """
    for name, path in hf.items():
        run_import(ImportConfig(output=output / name, hf=path), runtime)
    for name, config in rollouts.items():
        run_rollout(RolloutConfig(**config, output=output / f"rollout-{name}"), runtime)
        settings = {"candidates": output / f"rollout-{name}", "reward": {"function": f"{__name__}:reward"}}
        run_score(ScoreConfig(**settings, output=output / f"scored-{name}"), runtime)
    for size in per_shard:
        former, shards.RECORDS_PER_SHARD = shards.RECORDS_PER_SHARD, size
        settings = {"candidates": output / "single.jsonl", "reward": {"function": f"{__name__}:reward"}}
        if runtime.is_main:
            write_jsonl(output / "single.jsonl", stored_lines(output / "rollout-alone"))
        runtime.barrier()
        run_score(ScoreConfig(**settings, output=output / f"scored-by-{size}"), runtime)
        shards.RECORDS_PER_SHARD = former
    if runtime.is_main:
        records = stored_lines(output / f"scored-{next(iter(rollouts))}")
        ids = records[1]["candidates"][0]["token_ids"]
        ids[0] = 3 if ids[0] != 3 else 4
        write_jsonl(edited, records)
    runtime.barrier()


def align(runtime: Runtime, *, config: dict[str, Any]) -> Trained:
    """`run_align` as it is, with an eye on the scoring pass."""
    settings = AlignConfig(**config)
    scored = 0
    original = reference.candidate_logprobs

    def counted(policy: Any, groups: Sequence[Group], **named: Any) -> Any:
        nonlocal scored
        scored += len(groups)
        return original(policy, groups, **named)

    reference.candidate_logprobs = counted
    try:
        run_align(settings, runtime)
    finally:
        reference.candidate_logprobs = original
    lines = (settings.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Trained([json.loads(line) for line in lines], scored)


def refusals(runtime: Runtime, *, config: dict[str, Any], changes: list[dict[str, Any]]) -> list[str]:
    """The message of each refused configuration."""
    messages = []
    for change in changes:
        try:
            run_align(AlignConfig(**{**config, **change}), runtime)
        except ExoError as error:
            messages.append(str(error))
    return messages
