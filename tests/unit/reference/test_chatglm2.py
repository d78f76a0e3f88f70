"""The reference forward pass of ChatGLM2 against transformers' GLM, which has the same mathematics."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GlmConfig, GlmForCausalLM

from tests.reference.chatglm2 import BUFFER, ChatGlm2, load_chatglm2, save_chatglm2, tiny_chatglm2
from tests.reference.tiny_models import sequence_logits

ROW = [3, *range(5, 100, 3)]


def as_glm(model: ChatGlm2) -> GlmForCausalLM:
    """The same weights under GLM's names."""
    config = GlmConfig(
        vocab_size=model.config["padded_vocab_size"],
        hidden_size=model.config["hidden_size"],
        intermediate_size=model.config["ffn_hidden_size"],
        num_hidden_layers=model.config["num_layers"],
        num_attention_heads=model.config["num_attention_heads"],
        num_key_value_heads=model.config["multi_query_group_num"],
        head_dim=model.config["kv_channels"],
        max_position_embeddings=model.config["seq_length"],
        rms_norm_eps=model.config["layernorm_epsilon"],
        attention_bias=True,
        pad_token_id=None,
    )
    glm = GlmForCausalLM._from_config(config, attn_implementation="eager").eval()
    state = {
        "model.embed_tokens.weight": model.tensors["transformer.embedding.word_embeddings.weight"],
        "model.norm.weight": model.tensors["transformer.encoder.final_layernorm.weight"],
        "lm_head.weight": model.tensors["transformer.output_layer.weight"],
    }
    for number in range(config.num_hidden_layers):
        theirs, ours = f"transformer.encoder.layers.{number}", f"model.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{ours}.{norm}.weight"] = model.tensors[f"{theirs}.{norm}.weight"]
        for what in ("weight", "bias"):
            fused = model.tensors[f"{theirs}.self_attention.query_key_value.{what}"]
            for letter, part in zip("qkv", fused.split([64, 32, 32]), strict=True):
                state[f"{ours}.self_attn.{letter}_proj.{what}"] = part
        state[f"{ours}.self_attn.o_proj.weight"] = model.tensors[f"{theirs}.self_attention.dense.weight"]
        state[f"{ours}.mlp.gate_up_proj.weight"] = model.tensors[f"{theirs}.mlp.dense_h_to_4h.weight"]
        state[f"{ours}.mlp.down_proj.weight"] = model.tensors[f"{theirs}.mlp.dense_4h_to_h.weight"]
    glm.load_state_dict(state)
    return glm


def test_forward_is_that_of_glm() -> None:
    model = tiny_chatglm2(seed=4)
    logits = model.sequence_logits(ROW)
    assert logits.std() > 0.5
    assert (logits - sequence_logits(as_glm(model), ROW)).abs().max() < 2e-5


def test_saved_as_published(tmp_path: Path) -> None:
    model = tiny_chatglm2(seed=4, dtype=torch.float16)
    directory = save_chatglm2(model, tmp_path / "hf")
    names = {name for file in directory.glob("*.safetensors") for name in load_file(file)}
    assert names == {*model.tensors, BUFFER}
    loaded = load_chatglm2(directory)
    assert loaded.config == model.config
    assert torch.equal(loaded.sequence_logits(ROW), model.sequence_logits(ROW))
