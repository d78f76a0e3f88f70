"""A config.json becomes the ModelSpec that transformers reads from it; what cannot be expressed is refused by key."""

from __future__ import annotations

import importlib
import json
import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.activations import ACT2FN

from exo_megatron.conversion.families import FAMILIES, find_family
from exo_megatron.errors import CheckpointError
from exo_megatron.models.rotary import rotary_table
from exo_megatron.models.spec import Experts, ModelSpec, Rotary, RotaryScaling
from tests.unit.conversion.hub_configs import HUB

WHERE = "hf/config.json"
SIZES = {
    "vocab_size": 101,
    "hidden_size": 256,
    "intermediate_size": 48,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
}
GPT2_SIZES = {"model_type": "gpt2", "vocab_size": 101, "n_embd": 32, "n_layer": 3, "n_head": 4}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3_SCALING = RotaryScaling(
    kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
)
YARN = {"factor": 4.0, "original_max_position_embeddings": 512}
LONGROPE = {"short_factor": [1.0, 1.5, 2.0, 4.0], "long_factor": [2.0, 3.0, 4.0, 8.0]}
NULL_HEADS = {"num_key_value_heads": None}


def of(model_type: str, **changes: Any) -> dict[str, Any]:
    sizes = GPT2_SIZES if model_type == "gpt2" else SIZES
    return {**sizes, "model_type": model_type, **changes}


def read(values: dict[str, Any]) -> ModelSpec:
    return find_family(values, WHERE).read_config(values, WHERE)


def as_transformers_writes(values: dict[str, Any]) -> dict[str, Any]:
    """The config.json that transformers 5 makes of a hub file, with every default in it."""
    config = AutoConfig.for_model(**json.loads(json.dumps(values)))
    written: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    assert set(SIZES) - set(written) <= set(SIZES) - set(values)
    return written


NATIVE = sorted(FAMILIES.keys() - {"chatglm"})
"""Families that transformers has the code of."""


@pytest.mark.parametrize(
    "values",
    [
        *(of(family) for family in NATIVE),
        *(of(family, **NULL_HEADS) for family in ("llama", "qwen2", "qwen3", "phi3")),
        *(of(family, rope_theta=500.0) for family in NATIVE if family not in ("gpt2", "gpt_neox")),
        *(of(family, architectures=[FAMILIES[family].architectures[1]]) for family in NATIVE),
        of("gpt2", n_inner=48, tie_word_embeddings=False, activation_function="gelu"),
        of("gpt_neox", rotary_pct=0.5, rotary_emb_base=500, use_parallel_residual=False),
        of("gpt_neox", rope_scaling={"rope_type": "linear", "factor": 2.0}),
        of("llama", head_dim=10, rms_norm_eps=1e-4, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        of("llama", rope_scaling={"rope_type": "llama3", **LLAMA3}),
        of("llama", rope_scaling={"type": "linear", "factor": 3.0}, max_position_embeddings=64),
        of("llama", rope_scaling={"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 0.4}),
        of("llama", rope_scaling={"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "truncate": False}),
        of("llama", rope_scaling={"rope_type": "yarn", **YARN, "attention_factor": 1.5}),
        of("llama", rope_scaling={"rope_type": "longrope", **LONGROPE}, original_max_position_embeddings=64),
        of("mistral", sliding_window=None, head_dim=16),
        of("mistral", sliding_window=7),
        of("qwen2", use_sliding_window=True),
        of("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=0),
        of("qwen2", use_sliding_window=True, layer_types=["sliding_attention", "full_attention"] * 15),
        of("qwen3", use_sliding_window=True, max_window_layers=3, head_dim=16),
        of("qwen3_moe", use_sliding_window=True, head_dim=16, norm_topk_prob=True),
        of("qwen3_moe", num_experts_per_tok=1),
        of("gemma2", query_pre_attn_scalar=100, final_logit_softcapping=None, attn_logit_softcapping=None),
        of("gemma2", layer_types=["full_attention"] * 30, sliding_window=None),
        of("gemma3_text", sliding_window_pattern=4, rope_scaling={"rope_type": "linear", "factor": 8.0}),
        of("gemma3_text", rope_local_base_freq=300.0, sliding_window=10**6, final_logit_softcapping=3.0),
        of("phi3", partial_rotary_factor=0.75, sliding_window=7),
        of("phi3", rope_scaling={"type": "longrope", **LONGROPE}, max_position_embeddings=8192),
        of("glm", attention_bias=False, partial_rotary_factor=0.25, head_dim=16),
        of("mixtral", sliding_window=7, num_local_experts=4, num_experts_per_tok=3),
    ],
    ids=json.dumps,
)
def test_defaults_are_those_of_transformers(values: dict[str, Any]) -> None:
    assert read(values) == read(as_transformers_writes(values))


def rotary_of_transformers(values: dict[str, Any], *, layer_type: str | None = None) -> tuple[torch.Tensor, float]:
    config = AutoConfig.for_model(**json.loads(json.dumps(values)))
    package = type(config).__module__.split(".")[-2]
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    (name,) = (name for name in vars(module) if name.endswith("RotaryEmbedding") and "Vision" not in name)
    rotary = vars(module)[name](config)
    prefix = "" if layer_type is None else f"{layer_type}_"
    return getattr(rotary, f"{prefix}inv_freq"), getattr(rotary, f"{prefix}attention_scaling")


@pytest.mark.parametrize(
    "values",
    [
        *(values for values in HUB.values() if values["model_type"] not in ("gpt2", "chatglm", "gemma3_text")),
        of("llama", rope_scaling={"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 0.4}),
        of("llama", rope_scaling={"rope_type": "yarn", **YARN, "beta_fast": 16, "truncate": False}),
        of("llama", rope_scaling={"rope_type": "longrope", **LONGROPE}, original_max_position_embeddings=64),
        of("phi3", rope_scaling={"type": "longrope", **LONGROPE}, max_position_embeddings=8192),
        of("gpt_neox", rope_scaling={"rope_type": "linear", "factor": 2.0}, hidden_size=32 * 18),
    ],
    ids=lambda values: values["model_type"],
)
def test_frequencies_are_those_of_transformers(values: dict[str, Any]) -> None:
    rotary = read(values).rotary
    assert rotary is not None
    ours = rotary_table(rotary, local=False, device=torch.device("cpu"))
    frequencies, factor = rotary_of_transformers(values)
    torch.testing.assert_close(ours.frequencies, frequencies, rtol=1e-6, atol=0)
    assert ours.attention_factor == factor


@pytest.mark.parametrize("layer_type", ["full_attention", "sliding_attention"])
def test_frequencies_of_gemma3(layer_type: str) -> None:
    values = HUB["gemma-3-1b"] | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    rotary = read(values).rotary
    assert rotary is not None
    ours = rotary_table(rotary, local=layer_type == "sliding_attention", device=torch.device("cpu"))
    torch.testing.assert_close(ours.frequencies, rotary_of_transformers(values, layer_type=layer_type)[0])


DECODER: dict[str, Any] = {"activation": "silu", "gated": True, "norm": "rms", "qkv_bias": False, "labels": None}
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "gpt2-large": (
        774_030_080,
        {"norm": "layer", "rotary": None, "gated": False, "activation": "gelu_tanh", "tied_embeddings": True,
         "qkv_bias": True, "linear_bias": True, "ffn_hidden_size": 5120, "max_positions": 1024, "head_dim": 64},
    ),
    "pythia-2.8b": (
        2_775_208_960,
        {"norm": "layer", "rotary": Rotary(base=1e4, dim=20), "parallel_residual": True, "activation": "gelu",
         "gated": False, "qkv_bias": True, "linear_bias": True, "tied_embeddings": False, "max_positions": 2048},
    ),
    "Llama-3.1-8B": (
        8_030_261_248,
        DECODER | {"rotary": Rotary(base=5e5, dim=128, scaling=LLAMA3_SCALING), "max_positions": 131072},
    ),
    "Mistral-7B-v0.1": (7_241_732_096, DECODER | {"windows": (4096,) * 32, "rotary": Rotary(base=1e4, dim=128)}),
    "Mistral-7B-v0.3": (7_248_023_552, DECODER | {"windows": (), "rotary": Rotary(base=1e6, dim=128)}),
    "Qwen2.5-7B": (7_615_616_512, DECODER | {"qkv_bias": True, "linear_bias": False, "windows": ()}),
    "Qwen2.5-7B with YaRN": (
        7_615_616_512,
        {"rotary": Rotary(base=1e6, dim=128, scaling=RotaryScaling(
            kind="yarn", factor=4.0, original_max_positions=32768, attention_factor=0.1 * math.log(4) + 1))},
    ),
    "Qwen3-8B": (8_190_735_360, DECODER | {"qk_norm": True, "head_dim": 128, "windows": ()}),
    "gemma-2-9b": (
        9_241_705_984,
        {"activation": "gelu_tanh", "zero_centered_norm": True, "post_norms": True, "tied_embeddings": True,
         "embedding_scale": 3584**0.5, "attention_scale": 1 / 16, "attention_softcap": 50.0, "logit_softcap": 30.0,
         "windows": (4096, None) * 21, "qk_norm": False},
    ),
    "gemma-3-1b": (
        999_885_952,
        {"zero_centered_norm": True, "post_norms": True, "qk_norm": True, "tied_embeddings": True,
         "attention_softcap": None, "logit_softcap": None, "rotary": Rotary(base=1e6, dim=256, local_base=1e4),
         "windows": ((512,) * 5 + (None,)) * 4 + (512, 512)},
    ),
    "Phi-3-mini-4k": (3_821_079_552, DECODER | {"windows": (2047,) * 32, "rotary": Rotary(base=1e4, dim=96)}),
    "Phi-3-mini-128k": (3_821_079_552, DECODER | {"windows": (), "max_positions": 4096}),
    "Phi-4": (14_659_507_200, DECODER | {"windows": (), "max_positions": 16384, "kv_heads": 10}),
    "glm-4-9b-chat-hf": (
        9_399_951_360,
        DECODER | {"qkv_bias": True, "linear_bias": False, "post_norms": False,
                   "rotary": Rotary(base=5e6, dim=64, interleaved=True)},
    ),
    "GLM-4-9B-0414": (
        9_400_279_040,
        DECODER | {"qkv_bias": True, "post_norms": True, "rotary": Rotary(base=1e4, dim=64, interleaved=True)},
    ),
    "chatglm2-6b": (
        6_243_584_000,
        DECODER | {"qkv_bias": True, "linear_bias": False, "kv_heads": 2, "max_positions": 32768,
                   "rotary": Rotary(base=1e4, dim=64, interleaved=True), "vocab_size": 65024},
    ),
    "chatglm3-6b": (6_243_584_000, DECODER | {"qkv_bias": True, "max_positions": 8192}),
    "Mixtral-8x7B": (
        46_702_792_704,
        DECODER | {"experts": Experts(count=8, per_token=2, ffn_hidden_size=14336, normalized=True), "windows": ()},
    ),
    "Qwen3-30B-A3B": (
        30_532_122_624,
        DECODER | {"experts": Experts(count=128, per_token=8, ffn_hidden_size=768, normalized=True),
                   "ffn_hidden_size": 768, "qk_norm": True, "head_dim": 128},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_published_models(name: str) -> None:
    """Number of parameters as published, and what is particular to each."""
    parameters, expected = PUBLISHED[name]
    values = HUB[name]
    spec = read(values)
    assert {field: getattr(spec, field) for field in expected} == expected
    assert spec.family == values["model_type"]
    entries = [entry for rule in find_family(values, WHERE).tensors(spec) for entry in rule.entries()]
    assert sum(math.prod(shape) for entry in entries for shape in entry.sources.values()) == parameters
    if spec.family != "chatglm":
        assert read(as_transformers_writes(values)) == spec


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_other_names_of_longrope(name: str) -> None:
    """Of the first Phi-3 files; transformers 5 means to read them too, but its validation refuses them."""
    values = HUB["Phi-3-mini-128k"]
    assert read(values | {"rope_scaling": values["rope_scaling"] | {"type": name}}) == read(values)


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({}, 2),
        ({"num_labels": 1}, 1),
        ({"id2label": {"0": "score"}}, 1),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}, "num_labels": 3}, 3),
    ],
)
def test_classifier(changes: dict[str, Any], labels: int) -> None:
    values = of("gemma2", architectures=["Gemma2ForSequenceClassification"], **changes)
    spec = read(values)
    assert (spec.labels, spec.tied_embeddings, spec.logit_softcap) == (labels, False, None)
    assert read(of("gemma2", **changes)).labels is None


@pytest.mark.parametrize(
    ("rope", "base", "scaling"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}}, 5e5,
         RotaryScaling(kind="linear", factor=4.0)),
        ({"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}}, 5e5, LLAMA3_SCALING),
        ({"rope_parameters": LLAMA3 | {"rope_type": "llama3"}, "rope_theta": 5e5}, 5e5, LLAMA3_SCALING),
    ],
)  # fmt: skip
def test_rotary_of_transformers_4_and_5(rope: dict[str, Any], base: float, scaling: RotaryScaling | None) -> None:
    assert read(of("llama", **rope)).rotary == Rotary(base=base, dim=8, scaling=scaling)


def test_a_window_of_all_positions_keeps_the_local_base() -> None:
    spec = read(of("gemma3_text", sliding_window=100, max_position_embeddings=100))
    assert spec.windows == ((100,) * 5 + (None,)) * 5
    assert read(of("gemma2", sliding_window=100, max_position_embeddings=100)).windows == ()


@pytest.mark.parametrize(
    ("names", "ours"),
    [
        (("silu", "swish"), torch.nn.functional.silu),
        (("gelu", "gelu_python"), torch.nn.functional.gelu),
        (
            ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"),
            lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        ),
    ],
)
def test_activations_of_one_name_are_one_function(names: tuple[str, ...], ours: Any) -> None:
    x = torch.linspace(-12, 12, 10001)
    assert len({read(of("llama", hidden_act=name)).activation for name in names}) == 1
    for name in names:
        assert (ACT2FN[name](x) - ours(x)).abs().max() < 2e-6


CHATGLM = HUB["chatglm2-6b"]
CHATGLM1 = {"model_type": "chatglm", "architectures": ["ChatGLMModel"], "position_encoding_2d": True}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (of("mamba"), "model_type is 'mamba'; expected model_type: one of chatglm, gemma2, .*, qwen3, qwen3_moe"),
        (of(None), "model_type is None"),  # type: ignore[arg-type]
        (of("gemma3"), "model_type is 'gemma3': it holds a vision model too; .* gemma3_text"),
        (of("llama", architectures=["LlamaForTokenClassification"]), "architectures is .*one of LlamaForCausalLM"),
        (of("gpt2", architectures=["GPT2DoubleHeadsModel"]), "architectures is .*one of GPT2LMHeadModel, GPT2ForSeq"),
        (CHATGLM | {"architectures": ["ChatGLMForSequenceClassification"]}, "architectures is"),
        (of("llama", quantization_config={"bits": 4}), "quantization_config"),
        (of("llama", hidden_act="relu"), "hidden_act is 'relu'; expected hidden_act: 'silu'"),
        (of("gemma2", hidden_activation="relu"), "hidden_activation is 'relu'"),
        (of("llama", hidden_act=["silu"]), r"hidden_act is \['silu'\]; expected hidden_act: 'silu' or"),
        (of("gpt2", activation_function={"name": "gelu"}), "activation_function is {'name': 'gelu'}"),
        (of("llama", architectures=[["LlamaForCausalLM"]]), r"architectures is \[\['Llama.*one of LlamaForCausalLM"),
        (of("llama", architectures={"0": "LlamaForCausalLM"}), "architectures is {'0': .*one of LlamaForCausalLM"),
        (of(["llama"]), r"model_type is \['llama'\]; expected model_type: one of"),  # type: ignore[arg-type]
        (of("llama", attention_bias=True), r"attention_bias is True.*the same as mlp_bias \(False\)"),
        (of("llama", num_key_value_heads=3), "num_key_value_heads is 3.*divisor of the 32"),
        (of("llama", hidden_size=34), "num_attention_heads is 32.*divisor of hidden_size"),
        (of("llama", num_hidden_layers=None), "num_hidden_layers is None"),
        (of("llama", num_hidden_layers=0), "num_hidden_layers is 0; expected num_hidden_layers: a positive whole"),
        (of("llama", vocab_size="101"), "vocab_size is '101'"),
        (of("llama", rms_norm_eps=-1.0), "rms_norm_eps is -1.0"),
        (of("llama", rope_theta=float("inf")), "rope_theta is inf"),
        (of("llama", rope_theta=float("nan")), "rope_theta is nan"),
        (of("llama", tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'; expected .*: true or false"),
        (of("llama", rope_scaling={"type": "dynamic", "factor": 4.0}),
         "rope_scaling: type is 'dynamic': the frequencies of dynamic scaling depend on the length"),
        (of("llama", rope_scaling={"type": "proportional"}), "type is 'proportional'; expected type: 'default' or"),
        (of("llama", rope_scaling={"type": ["linear"]}), r"type is \['linear'\]; expected type: 'default' or"),
        (of("llama", rope_scaling={"type": "linear"}), "rope_scaling: factor is missing"),
        (of("llama", rope_scaling={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor is missing"),
        (of("llama", rope_scaling={"rope_type": "longrope", "short_factor": [1.0]}),
         r"short_factor is \[1.0\]; expected short_factor: a list of 4 numbers"),
        (of("llama", rope_scaling={"rope_type": "longrope", "short_factor": [1.0, 1.0, -1.0, 1.0]}),
         r"short_factor\[2\] is -1.0"),
        (of("llama", rope_scaling="linear"), "rope_scaling is 'linear'; expected rope_scaling: a mapping"),
        (of("llama", rope_parameters={"full_attention": {}}), "full_attention is {}; .*one rotary embedding for all"),
        (of("llama", rope_parameters={"rope_type": "default"}, rope_scaling={"type": "linear", "factor": 2.0}),
         "rope_scaling is .*not both"),
        (of("llama", rope_parameters={"partial_rotary_factor": 0.5}),
         "partial_rotary_factor is 0.5: transformers rotates whole heads"),
        (of("gpt_neox", rotary_pct=0.4), "rotary_pct is 0.4: it rotates 3 of the 8 elements of a head; .*an even"),
        (of("gpt_neox", rotary_pct=0.1), "rotary_pct is 0.1: it rotates 0 of the 8 elements"),
        (of("gpt_neox", rotary_pct=1e308), r"rotary_pct is 1e\+308; expected rotary_pct: at most 1"),
        (of("glm", rope_parameters={"partial_rotary_factor": 1.5}), "rope_parameters: partial_rotary_factor is 1.5"),
        (of("llama", head_dim=127), "head_dim is 127: all 127 elements of a head are rotated, in pairs; .*an even"),
        (of("llama", num_attention_heads=256), "head_dim is missing: all 1 elements of a head are rotated"),
        (of("phi3", head_dim=127), "head_dim is 127: all 127 elements of a head are rotated"),
        (of("gpt_neox", attention_bias=False), "attention_bias is False: a feed-forward block with biases"),
        (of("gpt2", scale_attn_weights=False), "scale_attn_weights is False: scores are always scaled"),
        (of("gpt2", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True: all layers scale"),
        (of("gpt2", add_cross_attention=True), "add_cross_attention is True: there is no encoder"),
        (of("gpt2", n_head=5), r"n_head is 5; expected n_head: a divisor of hidden_size \(32\)"),
        (of("qwen2", layer_types=["full_attention"]), "layer_types is .*30 entries that are full_attention or sliding"),
        (of("qwen2", layer_types=["chunked_attention"] * 30), "layer_types is"),
        (of("qwen2", layer_types=[["full_attention"]] * 30), "layer_types is .*30 entries that are full_attention or"),
        (of("qwen2", layer_types={"0": "full_attention"}), "layer_types is {.*30 entries that are full_attention or"),
        (of("qwen2", layer_types=["sliding_attention"] * 30), "sliding_window is missing.*some layers have a window"),
        (of("qwen3", attention_bias=True), "attention_bias is True: biases of attention alone"),
        (of("qwen3_moe", attention_bias=True), "attention_bias is True: biases of attention alone"),
        (of("qwen3_moe", decoder_sparse_step=2), "decoder_sparse_step is 2: layers without experts among"),
        (of("qwen3_moe", mlp_only_layers=[0]), r"mlp_only_layers is \[0\]: layers without experts among"),
        (of("mixtral", num_experts_per_tok=9), "num_experts_per_tok is 9; .*at most the 8 experts"),
        (of("mixtral", num_experts_per_tok=1), "num_experts_per_tok is 1: its weight is normalised to 1, through"),
        (of("qwen3_moe", num_experts_per_tok=1, norm_topk_prob=True), "num_experts_per_tok is 1: its weight is"),
        (of("gemma2", attention_bias=True), "attention_bias is True"),
        (of("gemma2", use_bidirectional_attention=True), "use_bidirectional_attention is True: tokens would see later"),
        (of("gemma2", sliding_window=None), "sliding_window is None; .*because some layers have a window"),
        (of("gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention is True"),
        (of("gemma3_text", attn_logit_softcapping=50.0), "attn_logit_softcapping is 50.0: .*; expected .*: null"),
        (of("gemma3_text", rope_parameters={"rope_type": "default"}), "rope_parameters is .*only full_attention"),
        (of("gemma3_text", rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
         "sliding_attention: rope_type is 'linear': .*layers with a window is not scaled"),
        (of("gemma3_text", rope_scaling={"rope_type": "yarn", "factor": 2.0}), "'default' or 'linear'"),
        (of("phi3", rope_scaling={"rope_type": "linear", "factor": 2.0}), "'default' or 'longrope'"),
        (CHATGLM1, "multi_query_attention is missing: this is ChatGLM-6B, the first version"),
        (CHATGLM | {"multi_query_attention": False}, "multi_query_attention is False"),
        (CHATGLM | {"multi_query_group_num": 3}, "multi_query_group_num is 3.*divisor of the 32"),
        (CHATGLM | {"rmsnorm": False}, "rmsnorm is False"),
        (CHATGLM | {"apply_residual_connection_post_layernorm": True}, "post_layernorm is True"),
        (CHATGLM | {"post_layer_norm": False}, "post_layer_norm is False"),
        (CHATGLM | {"original_rope": False}, "original_rope is False"),
        (CHATGLM | {"tie_word_embeddings": True}, "tie_word_embeddings is True: the published code"),
        (CHATGLM | {"fp32_residual_connection": True}, "fp32_residual_connection is True"),
        (CHATGLM | {"quantization_bit": 4}, "quantization_bit is 4: weights have to be unquantised"),
        (CHATGLM | {"pre_seq_len": 128}, "pre_seq_len is 128: the prefix of P-tuning"),
        (CHATGLM | {"rope_ratio": 50}, "rope_ratio is 50: published versions disagree"),
        (of("llama", architectures=["LlamaForSequenceClassification"], id2label={"0": "a"}, num_labels=2),
         "num_labels is 2; expected num_labels: 1, as id2label has"),
        (of("llama", architectures=["LlamaForSequenceClassification"], id2label=["a"]),
         r"id2label is \['a'\]; expected id2label: a mapping"),
    ],
)  # fmt: skip
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(values)
    assert caught.value.where.startswith(WHERE)
    assert "\n" not in str(caught.value)


def test_missing_key_is_called_missing() -> None:
    values = of("llama")
    del values["hidden_size"]
    with pytest.raises(CheckpointError, match="hidden_size is missing"):
        read(values)


@pytest.mark.parametrize("key", ["attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_dropout_is_no_part_of_the_model(family: str, key: str) -> None:
    assert read(of(family, **{key: 0.1})) == read(of(family))
