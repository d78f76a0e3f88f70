"""ChatGLM2-6B and ChatGLM3-6B, whose code is not in transformers: a plain forward pass and checkpoints as published.

Written from the published architecture, one sequence at a time, without cache or packing:

    x = embedding[ids];  for every layer: x += attention(norm(x)); x += feed_forward(norm(x));  logits = W norm(x)

Norms are RMSNorm. query_key_value is one linear with bias whose rows are all query heads, then the key heads of the
groups, then their value heads; query head h reads group h // (heads / groups). Rotary positions turn the first half of
every query and key head: elements 2i and 2i + 1 by the angle position * 10000^(-2i / (d / 2)). The feed-forward block
is W2 (silu(a) * b) with (a, b) the halves of W1 x. No other biases; the output layer is not tied.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.reference.tiny_llama import EOS_ID, UNK_ID, VOCAB_SIZE, tiny_tokenizer

CONFIG: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm2-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 96,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 64,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 4,
    "original_rope": True,
    "padded_vocab_size": VOCAB_SIZE,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 256,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
    "tie_word_embeddings": False,
    "eos_token_id": EOS_ID,
    "pad_token_id": UNK_ID,
}
BUFFER = "transformer.rotary_pos_emb.inv_freq"


@dataclass(frozen=True)
class ChatGlm2:
    """A model: its config.json and its tensors by their published names."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def sequence_logits(self, ids: Sequence[int]) -> Tensor:
        """[S, V] fp32: logits at every position of one sequence."""
        hidden = self._tensor("transformer.embedding.word_embeddings.weight")[torch.tensor(list(ids))]
        for number in range(self.config["num_layers"]):
            layer = f"transformer.encoder.layers.{number}"
            hidden = hidden + self._attention(self._norm(hidden, f"{layer}.input_layernorm.weight"), layer)
            hidden = hidden + self._feed_forward(self._norm(hidden, f"{layer}.post_attention_layernorm.weight"), layer)
        hidden = self._norm(hidden, "transformer.encoder.final_layernorm.weight")
        return hidden @ self._tensor("transformer.output_layer.weight").t()

    def _attention(self, hidden: Tensor, layer: str) -> Tensor:
        heads, groups, dim = (
            self.config[key] for key in ("num_attention_heads", "multi_query_group_num", "kv_channels")
        )
        name = f"{layer}.self_attention"
        qkv = hidden @ self._tensor(f"{name}.query_key_value.weight").t() + self._tensor(f"{name}.query_key_value.bias")
        queries, keys, values = qkv.split([heads * dim, groups * dim, groups * dim], dim=1)
        outputs = []
        for head in range(heads):
            group = head // (heads // groups)
            query = _rotate(queries[:, head * dim : (head + 1) * dim])
            key = _rotate(keys[:, group * dim : (group + 1) * dim])
            value = values[:, group * dim : (group + 1) * dim]
            rows = []
            for position in range(len(hidden)):
                scores = key[: position + 1] @ query[position] / math.sqrt(dim)
                rows.append(torch.softmax(scores, dim=0) @ value[: position + 1])
            outputs.append(torch.stack(rows))
        return torch.cat(outputs, dim=1) @ self._tensor(f"{name}.dense.weight").t()

    def _feed_forward(self, hidden: Tensor, layer: str) -> Tensor:
        both = hidden @ self._tensor(f"{layer}.mlp.dense_h_to_4h.weight").t()
        units = self.config["ffn_hidden_size"]
        gate, up = both[:, :units], both[:, units:]
        return (gate * torch.sigmoid(gate) * up) @ self._tensor(f"{layer}.mlp.dense_4h_to_h.weight").t()

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        mean_square = (hidden * hidden).mean(dim=1, keepdim=True)
        return hidden / torch.sqrt(mean_square + self.config["layernorm_epsilon"]) * self._tensor(name)

    def _tensor(self, name: str) -> Tensor:
        return self.tensors[name].float()


def _rotate(head: Tensor) -> Tensor:
    """[S, d], row p at position p."""
    rotated = head.clone()
    half = head.shape[1] // 2
    positions = torch.arange(len(head), dtype=torch.float64)
    for i in range(half // 2):
        angles = positions * 10000.0 ** (-2 * i / half)
        cos, sin = angles.cos().float(), angles.sin().float()
        x, y = head[:, 2 * i], head[:, 2 * i + 1]
        rotated[:, 2 * i] = x * cos - y * sin
        rotated[:, 2 * i + 1] = x * sin + y * cos
    return rotated


def tiny_chatglm2(*, seed: int, dtype: torch.dtype = torch.float32) -> ChatGlm2:
    """4 layers, 4 heads of 16 in 2 groups, vocabulary of 101, weights distributed as in tests/reference/weights.py."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in _shapes(CONFIG).items():
        values = torch.empty(shape)
        if name.endswith("bias"):
            values.normal_(0.0, 0.2, generator=generator)
        elif len(shape) == 1:
            values.uniform_(0.5, 1.5, generator=generator)
        else:
            values.normal_(0.0, 0.12, generator=generator)
        tensors[name] = values.to(dtype)
    return ChatGlm2(CONFIG | {"torch_dtype": str(dtype).removeprefix("torch.")}, tensors)


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    vocabulary, hidden, units = (config[key] for key in ("padded_vocab_size", "hidden_size", "ffn_hidden_size"))
    queries = config["num_attention_heads"] * config["kv_channels"]
    rows = queries + 2 * config["multi_query_group_num"] * config["kv_channels"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (vocabulary, hidden)}
    for number in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{number}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attention.query_key_value.weight": (rows, hidden),
            f"{layer}.self_attention.query_key_value.bias": (rows,),
            f"{layer}.self_attention.dense.weight": (hidden, queries),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.dense_h_to_4h.weight": (2 * units, hidden),
            f"{layer}.mlp.dense_4h_to_h.weight": (hidden, units),
        }
    return shapes | {
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (vocabulary, hidden),
    }


def save_chatglm2(model: ChatGlm2, directory: Path) -> Path:
    """As published: config.json, two shards with an index, among the tensors a buffer, and a tokenizer."""
    directory.mkdir(parents=True)
    half = model.config["kv_channels"] // 2
    buffer = 1.0 / 10000.0 ** (torch.arange(0, half, 2) / half)
    tensors = {BUFFER: buffer.to(torch.float16), **model.tensors}
    names = list(tensors)
    middle = len(names) // 2
    weight_map = {}
    for number, part in enumerate((names[:middle], names[middle:]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(dict(model.config), indent=2), encoding="utf-8")
    tiny_tokenizer().save_pretrained(directory)
    return directory


def load_chatglm2(directory: Path) -> ChatGlm2:
    """Read back what is in a directory, buffers left out."""
    tensors = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return ChatGlm2(config, {name: tensor for name, tensor in tensors.items() if name != BUFFER})
