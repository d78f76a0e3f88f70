"""The tokenizer beside the weights of an HF checkpoint, looked at before the weights are converted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from exo_megatron.errors import DataError

if TYPE_CHECKING:
    from exo_megatron.models.spec import ModelSpec

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def check_tokenizer_files(hf: Path, spec: ModelSpec) -> list[str]:
    """What to tell the user about a tokenizer that is absent or cannot be used; nothing where all is well.

    Weights without a tokenizer are converted, and those of models whose tokenizer names special tokens (of images,
    say) that they lack. Raises DataError if ordinary text can have ids that the model lacks.
    """
    from exo_megatron.data.tokenizer import load_tokenizer

    if not any((hf / name).is_file() for name in _FILES):
        return [f"note: {hf} has no tokenizer; stages that read text need one in data.tokenizer"]
    try:
        tokenizer = load_tokenizer(hf)
    except DataError as error:
        return [f"note: the tokenizer of {hf} is copied but cannot be used ({error.problem}); give data.tokenizer"]
    if tokenizer.fitted_to(spec.vocab_size).vocab_size < tokenizer.vocab_size:
        return [
            f"note: the tokenizer of {hf} has special tokens from id {spec.vocab_size} on, which the model lacks; "
            "a text that spells one is refused"
        ]
    return []
