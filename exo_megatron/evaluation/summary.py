"""The last checkpoint of every model in a few numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exo_megatron.evaluation.estimates import REFERENCE_NAME
from exo_megatron.utils.files import read_json

SUMMARY_KEYS = ("reward", "reward_stderr", "kl", "prompts")


def summarize_evaluation(path: Path, *, reference_name: str) -> dict[str, dict[str, float]]:
    """From an evaluation.json: reward, its standard error, KL and number of prompts by model, at its last step.

    reference_name: what the reference is called in the answer (``sft``).
    """
    checkpoints: list[dict[str, Any]] = read_json(path)["checkpoints"]
    return {
        reference_name if each["name"] == REFERENCE_NAME else each["name"]: {key: each[key] for key in SUMMARY_KEYS}
        for each in checkpoints  # steps ascend, so that the last one of a name stays
    }
