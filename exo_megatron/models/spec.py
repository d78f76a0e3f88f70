"""The architecture of a model, independent of the checkpoint format it came from."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

VOCABULARY_MULTIPLE = 128
"""Embedding rows are padded to a multiple of this, so that the stored shape is the same for every usual TP."""


class RotaryScaling(BaseModel):
    """Rotary frequency scaling. `llama3` uses all fields, `linear` only `factor`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


class ModelSpec(BaseModel):
    """A decoder-only transformer. Stored as `model.json` in every distributed checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    layers: int
    hidden_size: int
    ffn_hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_epsilon: float
    rotary_base: float
    rotary_scaling: RotaryScaling | None = None
    tied_embeddings: bool = False
    qkv_bias: bool = False
    linear_bias: bool = False

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrix: vocab_size rounded up to a multiple of VOCABULARY_MULTIPLE."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
