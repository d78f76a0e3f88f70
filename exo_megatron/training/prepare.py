"""What both training stages check before any model is built."""

from __future__ import annotations

from collections.abc import Sequence

from exo_megatron.data.groups import Group
from exo_megatron.errors import DataError
from exo_megatron.models.spec import ModelSpec


def check_groups(groups: Sequence[Group], spec: ModelSpec, max_tokens: int) -> None:
    """Raise DataError for a group that fits neither a micro-batch nor the model's positions."""
    for group in groups:
        longest = len(group.prompt) + max(len(candidate) for candidate in group.candidates)
        if longest > spec.max_positions:
            raise DataError(
                f"group {group.id}",
                f"prompt and candidate need {longest} positions",
                expected=f"at most {spec.max_positions}, the model's positions",
                fix="shorten it, or lower data.max_prompt_tokens and data.max_completion_tokens",
            )
        if group.num_tokens > max_tokens:
            raise DataError(
                f"group {group.id}",
                f"{group.num_tokens} tokens in prompt and candidates",
                expected=f"at most compute.max_tokens_per_microbatch = {max_tokens}",
                fix="raise compute.max_tokens_per_microbatch",
            )
