"""Tensors of a cut megatron-core model, put together again, those of a Llama under their HF names.

Written from megatron's layout alone. linear_qkv: for each key/value head, its query heads, then the key head, then the
value head, head_dim rows each; tensor-parallel ranks hold consecutive key/value heads. linear_fc1 of a gated model:
every tensor-parallel rank holds its rows of the gate, then its rows of the up projection. Norms, biases that are added
to complete sums, and position embeddings are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

LAYER_NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
OTHER_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
CUT_ROWS = ("linear_qkv.weight", "linear_qkv.bias", "word_embeddings.weight", "output_layer.weight")
CUT_ROWS_OF_BOTH_HALVES = ("linear_fc1.weight", "linear_fc1.bias")
CUT_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


def local_tensors(stage: nn.Module, pick: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """`pick` of every parameter of one pipeline stage, layers renumbered to their place in the whole model."""
    first = stage.decoder.layers[0].layer_number - 1
    named = {}
    for name, parameter in stage.named_parameters():
        if name.startswith("decoder.layers."):
            index, _, rest = name.removeprefix("decoder.layers.").partition(".")
            name = f"decoder.layers.{first + int(index)}.{rest}"
        named[name] = pick(parameter).detach().clone()
    return named


def whole_tensors(shards: Sequence[Mapping[str, Tensor]], *, gated: bool = True) -> dict[str, Tensor]:
    """One stage: the local tensors of its tensor-parallel ranks in order -> whole tensors by megatron's name.

    Raises ValueError if ranks disagree on a tensor that each holds whole.
    """
    return {name: _whole(name, [shard[name] for shard in shards], gated) for name in shards[0]}


def _whole(name: str, parts: Sequence[Tensor], gated: bool) -> Tensor:
    if name.endswith(CUT_ROWS_OF_BOTH_HALVES) and gated:
        halves = [part.chunk(2) for part in parts]
        return torch.cat([*(gate for gate, _ in halves), *(up for _, up in halves)])
    if name.endswith((*CUT_ROWS, *CUT_ROWS_OF_BOTH_HALVES)):
        return torch.cat(list(parts))
    if name.endswith(CUT_COLUMNS):
        return torch.cat(list(parts), dim=1)
    if any(not torch.equal(part, parts[0]) for part in parts[1:]):
        raise ValueError(f"{name}: tensor-parallel ranks differ on a tensor that each holds whole")
    return parts[0]


def to_hf(shards: Sequence[Mapping[str, Tensor]], config: LlamaConfig) -> dict[str, Tensor]:
    """`whole_tensors` of a Llama by HF name."""
    result: dict[str, Tensor] = {}
    for name, whole in whole_tensors(shards).items():
        if not name.startswith("decoder.layers."):
            result[OTHER_NAMES[name]] = whole if "norm" in name else _without_padding(whole, config, name)
            continue
        index, _, rest = name.removeprefix("decoder.layers.").partition(".")
        layer = f"model.layers.{index}."
        if rest == "self_attention.linear_qkv.weight":
            for letter, part in zip("qkv", _split_qkv(whole, config), strict=True):
                result[f"{layer}self_attn.{letter}_proj.weight"] = part
        elif rest == "mlp.linear_fc1.weight":
            result[f"{layer}mlp.gate_proj.weight"], result[f"{layer}mlp.up_proj.weight"] = whole.chunk(2)
        else:
            result[layer + LAYER_NAMES[rest]] = whole
    return result


def _split_qkv(whole: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor, Tensor]:
    head_dim = config.hidden_size // config.num_attention_heads
    per_group = config.num_attention_heads // config.num_key_value_heads
    rows_per_group = (per_group + 2) * head_dim
    query, key, value = [], [], []
    for group in range(config.num_key_value_heads):
        rows = whole[group * rows_per_group : (group + 1) * rows_per_group]
        query.append(rows[: per_group * head_dim])
        key.append(rows[per_group * head_dim : (per_group + 1) * head_dim])
        value.append(rows[(per_group + 1) * head_dim :])
    return torch.cat(query), torch.cat(key), torch.cat(value)


def _without_padding(whole: Tensor, config: LlamaConfig, name: str) -> Tensor:
    if whole[config.vocab_size :].any():
        raise ValueError(f"{name}: rows beyond the vocabulary are not zero")
    return whole[: config.vocab_size]
