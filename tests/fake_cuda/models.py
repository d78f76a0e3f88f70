"""Small models of the families that differ in their operators."""

from __future__ import annotations

from typing import Any

from exo_megatron.models.spec import Experts, ModelSpec, Rotary

HIDDEN_SIZE = 64
LLAMA: dict[str, Any] = {
    "hidden_size": HIDDEN_SIZE,
    "ffn_hidden_size": 128,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 16,
    "vocab_size": 500,
    "max_positions": 512,
    "norm_epsilon": 1e-5,
    "rotary": Rotary(base=1e4, dim=16),
}
GEMMA: dict[str, Any] = {
    "zero_centered_norm": True,
    "post_norms": True,
    "activation": "gelu_tanh",
    "tied_embeddings": True,
    "embedding_scale": 8.0,
}
BIASED: dict[str, Any] = {"norm": "layer", "gated": False, "qkv_bias": True, "linear_bias": True, "kv_heads": 8}
WINDOW = 4  # shorter than the prompts, so that it is not left out
LARGE: dict[str, Any] = {  # as a model of 8B; few tokens make nothing but its weights' gradients large
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "rotary": Rotary(base=5e5, dim=128),
}
DIFFERENCES: dict[str, dict[str, Any]] = {
    "llama": {},
    "large": LARGE,
    "large_tied": LARGE | {"tied_embeddings": True},
    "gpt2": BIASED | {"rotary": None, "activation": "gelu_tanh", "tied_embeddings": True},
    "neox": BIASED | {"parallel_residual": True, "activation": "gelu", "rotary": Rotary(base=1e4, dim=8)},
    "gemma2": GEMMA | {"attention_softcap": 50.0, "logit_softcap": 30.0},
    "gemma3": GEMMA | {"qk_norm": True, "rotary": Rotary(base=1e6, dim=16, local_base=1e4)},
    "qwen3": {"qk_norm": True, "tied_embeddings": True},
    "moe": {"experts": Experts(count=4, per_token=2, ffn_hidden_size=32, normalized=True), "ffn_hidden_size": 32},
}
WINDOWED = ("gemma2", "gemma3")


def model_spec(family: str, layers: int) -> ModelSpec:
    """A model of `layers` layers; where the family has windows, every second layer has one."""
    windows = (WINDOW, None) * (layers // 2) if family in WINDOWED else ()
    return ModelSpec(family=family, layers=layers, windows=windows, **LLAMA | DIFFERENCES[family])
