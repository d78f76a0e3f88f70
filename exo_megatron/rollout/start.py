"""What every stage that runs a policy reads and checks before any model is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exo_megatron.checkpoint.directory import read_fingerprint, read_spec, resolve_checkpoint, tokenizer_path
from exo_megatron.config.sections import ParallelConfig
from exo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from exo_megatron.errors import CheckpointError
from exo_megatron.models.build import check_topology
from exo_megatron.models.spec import ModelSpec


@dataclass(frozen=True)
class Start:
    """A policy's checkpoint."""

    checkpoint: Path
    spec: ModelSpec
    fingerprint: str


def find_policy(path: Path, parallel: ParallelConfig) -> Start:
    """The policy that a user means by a path (see resolve_checkpoint).

    Raises CheckpointError if there is none or it is a reward model, TopologyError if it cannot be cut as `parallel`
    says.
    """
    checkpoint = resolve_checkpoint(path)
    spec = read_spec(checkpoint)
    if spec.labels is not None:
        raise CheckpointError(
            str(checkpoint),
            f"is a reward model with {spec.labels} output{'s' if spec.labels > 1 else ''}",
            expected="a language model",
            fix="give the checkpoint of a policy; rewards of HF reward models come from the stage score",
        )
    check_topology(spec, parallel)
    return Start(checkpoint, spec, read_fingerprint(checkpoint))


def find_tokenizer(start: Start, other: Path | None) -> Tokenizer:
    """The checkpoint's own tokenizer, or the `other` one. Raises DataError if the vocabulary is too small for it."""
    return load_tokenizer(other or tokenizer_path(start.checkpoint)).fitted_to(start.spec.vocab_size)
