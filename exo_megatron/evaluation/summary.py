"""A summary of an evaluation: a few numbers for the last checkpoint of every model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exo_megatron.evaluation.estimates import REFERENCE_NAME
from exo_megatron.utils.files import read_json

SUMMARY_KEYS = ("reward", "reward_stderr", "kl", "kl_stderr", "prompts")


def summarize_evaluation(path: Path, *, reference_name: str) -> dict[str, dict[str, float]]:
    """Read reward and KL with their standard errors, and number of prompts, from an evaluation.json.

    The result has them by model, at its last step. `reference_name` is the key for the reference
    there (``sft``).
    """
    checkpoints: list[dict[str, Any]] = read_json(path)["checkpoints"]
    return {
        reference_name if each["name"] == REFERENCE_NAME else each["name"]: {key: each[key] for key in SUMMARY_KEYS}
        for each in checkpoints  # steps ascend, so the last step of a name remains
    }
