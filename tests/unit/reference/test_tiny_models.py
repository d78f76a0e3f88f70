"""The tiny models are worth comparing with: everything about them shows in their logits, far above the tolerance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.reference.tiny_models import ALTERNATING, GEMMA3, LANGUAGE_MODELS, LONGROPE, sequence_logits

ROW = [3, *range(4, 90, 2)]
TENSOR_VISIBLE = 0.02  # 200 times the tolerance of the parity tests
SETTING_VISIBLE = 5e-4  # 5 times; the two formulas of GELU differ that little


def linear(base: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": base}


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"activation_function": "gelu"}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"layer_norm_epsilon": 1e-2}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"hidden_act": "gelu_new"}),
    ("gpt_neox", {"rotary_pct": 0.5}),
    ("gpt_neox", {"rotary_emb_base": 11000}),
    ("llama", {"rope_parameters": linear(11000.0)}),
    ("llama-tied-llama3", {"rope_parameters": linear(500000.0)}),
    ("llama-yarn-biases", {"rope_parameters": linear(10000.0)}),
    ("mistral-window", {"sliding_window": 8}),
    ("mistral-window", {"sliding_window": 6}),
    ("qwen2-window", {"sliding_window": 7}),
    ("qwen2-window", {"max_window_layers": 2}),
    ("gemma2", {"query_pre_attn_scalar": 16}),
    ("gemma2", {"sliding_window": 8}),
    ("gemma2", {"layer_types": ALTERNATING[::-1]}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"hidden_activation": "gelu"}),
    ("gemma3_text", {"query_pre_attn_scalar": 16}),
    ("gemma3_text", {"sliding_window": 8}),
    ("gemma3_text", {"layer_types": ALTERNATING}),
    ("gemma3_text", {"rope_parameters": GEMMA3["rope_parameters"] | {"sliding_attention": linear(350.0)}}),
    ("gemma3_text", {"rope_parameters": GEMMA3["rope_parameters"] | {"full_attention": linear(20000.0)}}),
    ("phi3-window", {"sliding_window": 8}),
    ("phi3-window", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    ("phi3-longrope", {"rope_parameters": linear(10000.0)}),
    ("phi3-longrope", {"rope_parameters": LONGROPE | {"short_factor": LONGROPE["long_factor"]}}),
    ("phi3-longrope", {"rope_parameters": LONGROPE | {"attention_factor": 1.0}}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("qwen3_moe", {"num_experts_per_tok": 3}),
    ("qwen3_moe", {"norm_topk_prob": False}),
]


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_every_tensor_shows(name: str) -> None:
    """Rotated by one row, the least important tensor of the second and the last layer changes the logits."""
    model = LANGUAGE_MODELS[name].model().float()
    logits = sequence_logits(model, ROW)
    assert logits.std(dim=0).mean() > 0.3 and logits.std(dim=1).mean() > 0.3
    for parameter_name, parameter in model.named_parameters():
        if ".0." in parameter_name or ".2." in parameter_name:
            continue
        original = parameter.data
        parameter.data = original.roll(1, dims=0)
        change = (sequence_logits(model, ROW) - logits).abs().max()
        parameter.data = original
        assert change > TENSOR_VISIBLE, parameter_name


@pytest.mark.parametrize(("name", "changes"), CHANGES)
def test_every_setting_shows(name: str, changes: dict[str, Any]) -> None:
    tiny = LANGUAGE_MODELS[name]
    with torch.no_grad():
        change = sequence_logits(tiny.model(**changes), ROW) - sequence_logits(tiny.model(), ROW)
    assert change.abs().max() > SETTING_VISIBLE
