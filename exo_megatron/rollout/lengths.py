"""Checks of prompt lengths before any model is built."""

from __future__ import annotations

import numpy as np

from exo_megatron.config.sections import ComputeConfig, ParallelConfig, SamplingConfig
from exo_megatron.data.packing import microbatch_capacity
from exo_megatron.data.prepared import Prepared, prompt_lengths
from exo_megatron.data.prompts import Prompt
from exo_megatron.errors import DataError
from exo_megatron.models.spec import ModelSpec


def check_lengths(prompts: Prepared[Prompt], sampling: SamplingConfig, spec: ModelSpec) -> None:
    """Raise DataError, naming the prompt, if it and a candidate exceed the model's positions."""
    prompt = _first_over(prompts, spec.max_positions - sampling.max_new_tokens)
    if prompt is not None:
        total = len(prompt.ids) + sampling.max_new_tokens
        raise DataError(
            f"prompt {prompt.id!r}",
            f"{len(prompt.ids)} tokens + sampling.max_new_tokens {sampling.max_new_tokens} = {total}",
            expected=f"at most the model's {spec.max_positions} positions",
            fix="lower sampling.max_new_tokens or data.max_prompt_tokens, or drop the prompt",
        )


def check_microbatch_length(
    prompts: Prepared[Prompt], sampling: SamplingConfig, compute: ComputeConfig, parallel: ParallelConfig
) -> None:
    """Raise DataError, naming the prompt, if it and one candidate exceed a micro-batch."""
    capacity = microbatch_capacity(compute.max_tokens_per_microbatch, parallel.token_multiple)
    prompt = _first_over(prompts, capacity - sampling.max_new_tokens)
    if prompt is not None:
        raise DataError(
            f"prompt {prompt.id!r}",
            f"{len(prompt.ids)} tokens + sampling.max_new_tokens {sampling.max_new_tokens}",
            expected=f"at most {capacity}, one packed micro-batch (compute.max_tokens_per_microbatch)",
            fix="raise compute.max_tokens_per_microbatch",
        )


def _first_over(prompts: Prepared[Prompt], most: int) -> Prompt | None:
    """Return the first prompt with more than so many tokens, None if there is none."""
    over = np.flatnonzero(prompt_lengths(prompts) > most)
    return prompts[int(over[0])] if len(over) else None
