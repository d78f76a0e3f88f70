"""Tables of families whose tensors have the names and places of Llama's, except in some blocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from exo_megatron.conversion.hf_config import HfConfig
from exo_megatron.conversion.hf_decoder import CLASSIFIER, with_head
from exo_megatron.conversion.rules import Family, TensorRule
from exo_megatron.conversion.tables import Table
from exo_megatron.conversion.transforms import fused_qkv
from exo_megatron.models.spec import ModelSpec

Block = Callable[[Table], list[TensorRule]]
Tensors = Callable[[ModelSpec], tuple[TensorRule, ...]]

PRE_NORMS = {"pre_mlp_layernorm": "post_attention_layernorm"}
"""Key of ours and name of HF's, for the norms of a layer besides the first."""


def separate_qkv(table: Table) -> list[TensorRule]:
    """List the rules of query, key and value projections as three linears."""
    return table.separate_qkv("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def one_qkv(table: Table) -> list[TensorRule]:
    """List the rules of query, key and value projections in one linear, one below the other."""
    spec = table.spec
    return table.fused_qkv("self_attn.qkv_proj", fused_qkv(spec.heads, spec.kv_heads, spec.head_dim))


def separate_feed_forward(table: Table) -> list[TensorRule]:
    """List the rules of gate and up projections as two linears, and of the down projection."""
    return table.feed_forward(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")


def one_feed_forward(table: Table) -> list[TensorRule]:
    """List the rules of one linear with gate above up projection, and of the down projection."""
    return table.feed_forward(("mlp.gate_up_proj",), "mlp.down_proj")


def decoder_tensors(
    norms: Mapping[str, str] = PRE_NORMS, qkv: Block = separate_qkv, feed_forward: Block = separate_feed_forward
) -> Tensors:
    """Return the function that lists the rules of a model of a family.

    `norms` maps our keys to HF's names for the norms of a layer besides the first. `qkv` and
    `feed_forward` list the rules of these blocks.
    """

    def tensors(spec: ModelSpec) -> tuple[TensorRule, ...]:
        table = Table(spec, "model.layers.{0}")
        return (
            *table.embedding("model.embed_tokens"),
            *table.norm("input_layernorm", "input_layernorm"),
            *qkv(table),
            *table.head_norms("self_attn.q_norm", "self_attn.k_norm"),
            *table.attention_output("self_attn.o_proj"),
            *(rule for key, name in norms.items() for rule in table.norm(key, name)),
            *feed_forward(table),
            *table.final_norm("model.norm"),
            *table.head("lm_head"),
        )

    return tensors


def decoder_family(
    model_type: str,
    classes: str,
    read: Callable[[HfConfig], ModelSpec],
    tensors: Tensors | None = None,
    *,
    classifier: str | None = None,
) -> Family:
    """Make a family with these rules, or with Llama's.

    Args:
        model_type: the key of the same name in config.json.
        classes: beginning of the names of the family's classes in transformers.
        read: reads the model from its config.
        tensors: lists the rules of a model; None for Llama's rules.
        classifier: beginning of the classifier's name, if it is not `classes`.
    """
    return Family(
        model_type=model_type,
        architectures=(f"{classes}ForCausalLM", f"{classifier or classes}{CLASSIFIER}"),
        read_config=with_head(read),
        tensors=decoder_tensors() if tensors is None else tensors,
        base_prefix="model.",
        tied_output=("lm_head.weight", "model.embed_tokens.weight"),
        ignored=(re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),),
    )
