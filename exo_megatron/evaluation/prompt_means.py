"""The file with what every checkpoint of an evaluation gets at every prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from exo_megatron.evaluation.estimates import Estimate, PromptMeans
from exo_megatron.utils.files import read_jsonl, write_jsonl


def write_prompt_means(path: Path, estimates: Sequence[Estimate], means: Sequence[PromptMeans]) -> None:
    """Write a line per checkpoint: its name and step, and reward and KL at each prompt, in order."""
    write_jsonl(
        path,
        (
            {"name": each.name, "step": each.step, "rewards": mean.rewards.tolist(), "kls": mean.kls.tolist()}
            for each, mean in zip(estimates, means, strict=True)
        ),
    )


def read_prompt_means(path: Path) -> Mapping[str, Mapping[int | None, PromptMeans]]:
    """Read what `write_prompt_means` wrote, by name and step (None for a converted model)."""
    found: dict[str, dict[int | None, PromptMeans]] = {}
    for _, line in read_jsonl(path):
        found.setdefault(line["name"], {})[line["step"]] = PromptMeans.of(line["rewards"], line["kls"])
    return found
