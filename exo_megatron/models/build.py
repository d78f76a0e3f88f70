"""Builds this rank's part of a policy from a ModelSpec: megatron-core configuration and layer specs."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from exo_megatron.config.sections import ComputeConfig, ParallelConfig
from exo_megatron.errors import TopologyError
from exo_megatron.models.experts import check_experts, expert_settings, mark_experts_sharded
from exo_megatron.models.layers import ACTIVATIONS, block_spec
from exo_megatron.models.linear import linear_backend
from exo_megatron.models.policy import PolicyModel
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.topology import Topology

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_RECOMPUTE: dict[str, dict[str, object]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def check_topology(spec: ModelSpec, parallel: ParallelConfig) -> None:
    """Raise TopologyError unless every dimension that is cut can be cut evenly. Needs no process group."""
    tensor, pipeline = parallel.tensor, parallel.pipeline
    cuts = [
        ("parallel.tensor", tensor, "attention heads", spec.heads),
        ("parallel.tensor", tensor, "key/value heads", spec.kv_heads),
        ("parallel.tensor", tensor, "embedding rows", spec.padded_vocab_size),
        ("parallel.pipeline", pipeline, "layers", spec.layers),
    ]
    if spec.experts is None:
        cuts.append(("parallel.tensor", tensor, "feed-forward units", spec.ffn_hidden_size))
    for key, size, what, count in cuts:
        if count % size:
            raise TopologyError(
                key,
                f"{size} does not divide the model's {count} {what}",
                expected=f"a divisor of {count}",
                fix=f"change {key}",
            )
    check_experts(spec, parallel)


def build_policy(spec: ModelSpec, topology: Topology, compute: ComputeConfig) -> PolicyModel:
    """This rank's pipeline stage and tensor shard, parameters uninitialised, on the topology's device.

    Parameters are in `compute.precision`. Raises TopologyError where the model cannot be cut that way.
    """
    check_topology(spec, topology.parallel)
    config = transformer_config(spec, topology, compute)
    per_stage = spec.layers // topology.pipeline_size
    first = topology.pipeline_rank * per_stage
    block = block_spec(spec, config, linear_backend(config.params_dtype), range(first, first + per_stage))
    policy = PolicyModel(
        config, block, spec, is_first_stage=topology.is_first_stage, is_last_stage=topology.is_last_stage
    )
    _mark_tensor_parallel(policy)
    mark_experts_sharded(policy)
    policy.to(topology.device)  # megatron-core makes routers on the CPU
    return policy


def _mark_tensor_parallel(policy: PolicyModel) -> None:
    """Say of every sharded weight that it is sharded, as megatron-core's initialisation would.

    megatron-core 0.16 marks weights only when it also initialises them. An unmarked weight counts as replicated over
    the tensor group: its gradient on tensor ranks above 0 would be left out of the gradient norm.
    """
    cut_along = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in policy.modules():
        dim = cut_along.get(type(module))
        weight = vars(module)["_parameters"].get("weight")
        if dim is not None and weight is not None and "tensor_model_parallel" not in vars(weight):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def transformer_config(spec: ModelSpec, topology: Topology, compute: ComputeConfig) -> TransformerConfig:
    """megatron-core's configuration of the model at this topology."""
    dtype = DTYPES[compute.precision]
    settings: dict[str, object] = {
        "num_layers": spec.layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.ffn_hidden_size,
        "num_attention_heads": spec.heads,
        "num_query_groups": spec.kv_heads,
        "kv_channels": spec.head_dim,
        "normalization": "RMSNorm" if spec.norm == "rms" else "LayerNorm",
        "layernorm_epsilon": spec.norm_epsilon,
        "qk_layernorm": spec.qk_norm,
        "gated_linear_unit": spec.gated,
        "activation_func": ACTIVATIONS[spec.activation],
        "add_bias_linear": spec.linear_bias,
        "add_qkv_bias": spec.qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "tensor_model_parallel_size": topology.tensor_size,
        "pipeline_model_parallel_size": topology.pipeline_size,
        "sequence_parallel": topology.sequence_parallel,
        # Rows of micro-batches differ in length; megatron-core allows that only with this dispatcher.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        # The loss function returns (sum over groups, number of groups, report): an exact global mean.
        "calculate_per_token_loss": True,
        "perform_initialization": False,
        "deallocate_pipeline_outputs": True,
        # megatron-core's fused GELU is always the tanh approximation.
        "bias_activation_fusion": spec.gated and spec.activation == "silu",
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        # Only where parameters have gradient buffers: linear.add_gradients_in_place.
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        **expert_settings(spec, topology),
        **_RECOMPUTE[compute.recompute],
    }
    return TransformerConfig(**settings)
