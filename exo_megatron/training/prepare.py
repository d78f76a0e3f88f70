"""What both training stages check and read before any model is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exo_megatron.checkpoint.directory import read_fingerprint, read_spec, resolve_checkpoint, tokenizer_path
from exo_megatron.config.stages import AlignConfig, SftConfig
from exo_megatron.data.groups import Group
from exo_megatron.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from exo_megatron.errors import DataError
from exo_megatron.models.build import check_topology
from exo_megatron.models.spec import ModelSpec


@dataclass(frozen=True)
class Start:
    """The checkpoint that training starts from."""

    checkpoint: Path
    spec: ModelSpec
    fingerprint: str
    tokenizer: Tokenizer


def read_start(config: SftConfig | AlignConfig) -> Start:
    """Resolve checkpoint and tokenizer. Raises ExoError for a model that cannot be cut as `parallel` says."""
    checkpoint = resolve_checkpoint(config.model.checkpoint)
    spec = read_spec(checkpoint)
    check_topology(spec, config.parallel)
    tokenizer = load_tokenizer(config.data.tokenizer or tokenizer_path(checkpoint))
    check_vocabulary(tokenizer, spec.vocab_size)
    return Start(checkpoint, spec, read_fingerprint(checkpoint), tokenizer)


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
