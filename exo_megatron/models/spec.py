"""The architecture of a model, independent of the checkpoint format it came from."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

VOCABULARY_MULTIPLE = 128
"""The number of embedding rows is padded to a multiple of this.

So the stored shape is the same for every usual tensor-parallel size.
"""

LARGEST_LAYERS, LARGEST_EXPERTS, LARGEST_SIZE = 10_000, 10_000, 2**24
LARGEST_EXPERTS_IN_ALL = 2**18
"""Far beyond any model. Work and memory grow with what a file says before its tensors are compared with it."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RotaryScaling(_Part):
    """Rotary frequency scaling, with the names of HF's `ROPE_INIT_FUNCTIONS`.

    Each kind reads its own fields. linear: factor. llama3: factor, low_freq_factor,
    high_freq_factor, original_max_positions. yarn: factor, beta_fast, beta_slow, truncate,
    original_max_positions. longrope: frequency_divisors [dim / 2]. attention_factor multiplies
    cosines and sines (yarn, longrope).
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    frequency_divisors: tuple[float, ...] = ()
    attention_factor: float = 1.0


class Rotary(_Part):
    """Rotary position embedding of the first `dim` elements of every head.

    interleaved: elements 2i and 2i + 1 are a pair (GLM); else i and i + dim / 2 (most others).
    local_base: base of the layers that have a window, which are then not scaled (Gemma 3); None: as
    the others.
    """

    base: float
    dim: int
    interleaved: bool = False
    scaling: RotaryScaling | None = None
    local_base: float | None = None


class Experts(_Part):
    """A mixture of experts in place of every feed-forward block.

    Each token uses the `per_token` of `count` experts with the largest softmax router probability,
    and weights them by it. normalized: these weights are divided by their sum.
    """

    count: int = Field(le=LARGEST_EXPERTS)
    per_token: int
    ffn_hidden_size: int
    normalized: bool


class ModelSpec(_Part):
    """A decoder-only transformer. Stored as `model.json` in every distributed checkpoint."""

    family: str
    layers: int = Field(le=LARGEST_LAYERS)
    hidden_size: int = Field(le=LARGEST_SIZE)
    ffn_hidden_size: int = Field(le=LARGEST_SIZE)
    heads: int = Field(le=LARGEST_SIZE)
    kv_heads: int = Field(le=LARGEST_SIZE)
    head_dim: int = Field(le=LARGEST_SIZE)
    vocab_size: int = Field(le=LARGEST_SIZE)
    max_positions: int

    norm_epsilon: float
    norm: Literal["rms", "layer"] = "rms"
    zero_centered_norm: bool = False
    """Norms multiply by 1 + weight (Gemma)."""
    post_norms: bool = False
    """Attention's and feed-forward's outputs are normalised before the sum (Gemma, GLM-4-0414)."""
    qk_norm: bool = False
    """Every query and key head is normalised before the rotary embedding (Qwen 3, Gemma 3)."""
    parallel_residual: bool = False
    """Attention and feed-forward block both read the layer's input (GPT-NeoX)."""

    rotary: Rotary | None
    """None: learned positions (GPT-2)."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    qkv_bias: bool = False
    linear_bias: bool = False
    """Biases of the attention output and of the feed-forward linears."""
    tied_embeddings: bool = False
    embedding_scale: float | None = None
    """Embeddings are multiplied by this, rounded to their type (Gemma)."""

    attention_scale: float | None = None
    """Scores are multiplied by this; None: head_dim^-1/2."""
    attention_softcap: float | None = None
    """Scores s become c tanh(s / c) (Gemma 2)."""
    logit_softcap: float | None = None
    """Logits z become c tanh(z / c) (Gemma 2)."""
    windows: tuple[int | None, ...] = ()
    """How many tokens a token of each layer sees, itself included; None: all before it.

    Empty: None for every layer.
    """

    experts: Experts | None = None
    labels: int | None = None
    """A reward model or classifier with this many outputs instead of the vocabulary; None: a
    language model.
    """

    @model_validator(mode="after")
    def _bound_experts(self) -> Self:
        if self.experts is not None and self.layers * self.experts.count > LARGEST_EXPERTS_IN_ALL:
            raise ValueError(f"{self.layers} layers of {self.experts.count} experts")
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of VOCABULARY_MULTIPLE."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def window(self, layer: int) -> int | None:
        """Return the window, in tokens, of a layer counted from 0 over all pipeline stages;
        None: no window.
        """
        return self.windows[layer] if self.windows else None
