"""Tiny random Hugging Face models of every family that transformers has the code of.

All have 4 layers, 4 heads of 16 with 2 key/value heads where the family has grouped heads, 101 words and 256
positions. Windows are shorter than the rows of the tests, caps low enough to bend, head_dim and scales not the usual
multiples of hidden_size, so that a default in place of the configured value shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.reference.tiny_llama import BOS_ID, EOS_ID, VOCAB_SIZE, save_hf, tiny_config
from tests.reference.weights import draw_weights

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": None,
}
SIZES: dict[str, Any] = {
    **COMMON,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
HEAD_DIM = {**GROUPED, "hidden_size": 72, "head_dim": 16}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.8, 2.0, 2.5],
    "long_factor": [1.0, 1.4, 2.0, 2.7, 3.5, 4.4, 5.2, 6.0],
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class Tiny:
    """A tiny model of one family. labels: a sequence classifier with this many outputs."""

    name: str
    config_class: type[PreTrainedConfig]
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    labels: int | None = None

    def config(self, **changes: Any) -> PreTrainedConfig:
        settings = self.settings | changes
        if self.labels is not None:
            settings |= {"num_labels": self.labels}
        return self.config_class(**settings)

    def model(self, *, seed: int = 21, **changes: Any) -> PreTrainedModel:
        """With eager attention: plain matrix products. changes: of the settings."""
        auto = AutoModelForCausalLM if self.labels is None else AutoModelForSequenceClassification
        model = auto.from_config(self.config(**changes), attn_implementation="eager")
        return draw_weights(model, seed=seed, dtype=self.dtype)

    def save(self, directory: Path) -> Path:
        """Config, safetensors, generation config and tokenizer as transformers writes them."""
        return save_hf(self.model(), directory)

    def classifier(self, labels: int) -> Tiny:
        return replace(self, name=f"{self.name}-{labels}-labels", labels=labels)


def _llama(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Tiny:
    config = tiny_config(**settings)
    return Tiny(name, type(config), config.to_diff_dict(), dtype)


GPT2_SIZES = {**COMMON, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256}
GEMMA2 = {
    **HEAD_DIM,
    "query_pre_attn_scalar": 24,
    "sliding_window": 7,
    "layer_types": ALTERNATING,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 2.0,
}
GEMMA3 = {
    **HEAD_DIM,
    "query_pre_attn_scalar": 24,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    },
}
GLM = {**GROUPED, "head_dim": 16, "attention_bias": True}
MIXTRAL = {**GROUPED, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3_MOE = {
    **HEAD_DIM,
    "moe_intermediate_size": 48,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}

LANGUAGE_MODELS = {
    tiny.name: tiny
    for tiny in (
        Tiny("gpt2", GPT2Config, GPT2_SIZES),
        Tiny("gpt2-untied", GPT2Config, {**GPT2_SIZES, "n_inner": 96, "tie_word_embeddings": False}),
        Tiny("gpt_neox", GPTNeoXConfig, SIZES),
        Tiny(
            "gpt_neox-sequential-tied",
            GPTNeoXConfig,
            {**SIZES, "use_parallel_residual": False, "tie_word_embeddings": True, "rotary_pct": 0.5},
        ),
        _llama("llama"),
        _llama("llama-tied-llama3", tied=True, head_dim=32, rope_scaling={**LLAMA3, "rope_theta": 500000.0}),
        _llama(
            "llama-all-heads-linear",
            num_key_value_heads=4,
            vocab_size=90,
            rope_scaling={"rope_type": "linear", "factor": 2.0},
        ),
        _llama("llama-one-kv-head", num_key_value_heads=1),
        _llama("llama-bf16", torch.bfloat16),
        _llama("llama-yarn-biases", rope_scaling=YARN, attention_bias=True, mlp_bias=True),
        Tiny("mistral", MistralConfig, {**HEAD_DIM, "sliding_window": None}),
        Tiny("mistral-window", MistralConfig, {**GROUPED, "sliding_window": 7}),
        Tiny("qwen2", Qwen2Config, GROUPED),
        Tiny("qwen2-tied-bf16", Qwen2Config, {**GROUPED, "tie_word_embeddings": True}, torch.bfloat16),
        Tiny(
            "qwen2-window",
            Qwen2Config,
            {**GROUPED, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        ),
        Tiny("qwen3", Qwen3Config, HEAD_DIM),
        Tiny("qwen3-tied", Qwen3Config, {**HEAD_DIM, "tie_word_embeddings": True}),
        Tiny("gemma2", Gemma2Config, GEMMA2),
        Tiny("gemma3_text", Gemma3TextConfig, GEMMA3),
        Tiny("gemma3_text-bf16", Gemma3TextConfig, GEMMA3, torch.bfloat16),
        Tiny("phi3", Phi3Config, GROUPED),
        Tiny(
            "phi3-window",
            Phi3Config,
            {
                **GROUPED,
                "sliding_window": 7,
                "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75},
            },
        ),
        Tiny(
            "phi3-longrope",
            Phi3Config,
            {**GROUPED, "original_max_position_embeddings": 128, "rope_parameters": LONGROPE},
        ),
        Tiny("glm", GlmConfig, GLM),
        Tiny("glm4", Glm4Config, GLM),
        Tiny("mixtral", MixtralConfig, MIXTRAL),
        Tiny("mixtral-window-bf16", MixtralConfig, {**MIXTRAL, "sliding_window": 7}, torch.bfloat16),
        Tiny("qwen3_moe", Qwen3MoeConfig, QWEN3_MOE),
        Tiny(
            "qwen3_moe-unnormalised-tied",
            Qwen3MoeConfig,
            {**QWEN3_MOE, "norm_topk_prob": False, "tie_word_embeddings": True},
        ),
    )
}
CLASSIFIERS = {
    tiny.name: tiny
    for tiny in (
        LANGUAGE_MODELS["gpt2"].classifier(1),
        LANGUAGE_MODELS["gpt_neox"].classifier(3),
        LANGUAGE_MODELS["llama"].classifier(1),
        LANGUAGE_MODELS["llama-bf16"].classifier(3),
        LANGUAGE_MODELS["qwen2"].classifier(1),
        LANGUAGE_MODELS["gemma2"].classifier(1),
        LANGUAGE_MODELS["gemma3_text"].classifier(3),
        LANGUAGE_MODELS["phi3-window"].classifier(1),
        LANGUAGE_MODELS["mixtral"].classifier(1),
    )
}
MODELS = LANGUAGE_MODELS | CLASSIFIERS


def sequence_logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """fp32, of one sequence: a language model's logits [S, V] at all positions, a classifier's [labels] at the last."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()
    return logits
