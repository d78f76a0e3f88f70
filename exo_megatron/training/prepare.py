"""What both training stages check before any model is built."""

from __future__ import annotations

from collections.abc import Sequence

from exo_megatron.config.sections import ComputeConfig, ParallelConfig
from exo_megatron.data.groups import Group
from exo_megatron.data.oversized import check_fits_in_parts
from exo_megatron.errors import DataError
from exo_megatron.models.spec import ModelSpec


def check_groups(groups: Sequence[Group], spec: ModelSpec, compute: ComputeConfig, parallel: ParallelConfig) -> None:
    """Raise DataError for a group with too many positions, or that fits into micro-batches not even in parts."""
    for group in groups:
        longest = len(group.prompt) + max(len(candidate) for candidate in group.candidates)
        if longest > spec.max_positions:
            raise DataError(
                f"group {group.id}",
                f"prompt and candidate need {longest} positions",
                expected=f"at most {spec.max_positions}, the model's positions",
                fix="shorten it, or lower data.max_prompt_tokens and data.max_completion_tokens",
            )
        check_fits_in_parts(group, max_tokens=compute.max_tokens_per_microbatch, multiple=parallel.row_multiple)
