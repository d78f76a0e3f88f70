"""The model: megatron-core's GPTModel on packed candidate groups, built from a ModelSpec.

A policy ends in hidden states instead of logits, a reward model in scores of every candidate.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from exo_megatron.config.sections import ComputeConfig, ParallelConfig
from exo_megatron.errors import ConfigError, TopologyError
from exo_megatron.models.attention.kernels import FLASH_HEAD_MULTIPLE, FLASH_LARGEST_HEAD, may_use_flash_varlen
from exo_megatron.models.experts import check_experts, expert_settings
from exo_megatron.models.layers import block_spec
from exo_megatron.models.layouts.base import Layout
from exo_megatron.models.main_grad import adapt_embedding
from exo_megatron.models.numerics import product
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.topology import Topology


class ScoreHead(torch.nn.Module):
    """Linear without bias to a few outputs (`score` of HF's ...ForSequenceClassification).

    It is whole on every tensor-parallel rank of the last pipeline stage.
    """

    def __init__(self, labels: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(labels, hidden_size, dtype=dtype, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Score hidden states [C, H] -> [C, labels] fp32, equal on all tensor-parallel ranks."""
        return product(hidden, self.weight.t())


# megatron-core 0.19 warns on every construction that GPTModel is in maintenance; both supported
# versions have it.
logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)


class PolicyModel(GPTModel):
    """One pipeline stage of the model, described by its `spec`.

    `packed_seq_params` carries the layout. The last pipeline stage of a policy returns hidden
    states, complete on every tensor-parallel rank. Their backward sums the partial gradients of the
    ranks: under sequence parallelism gather forward, reduce-scatter backward; without it identity
    forward, all-reduce backward, over the tensor group. The vocabulary-parallel projection that
    follows must therefore return each rank's own partial gradient and not reduce it again.

    The last pipeline stage of a reward model (`spec.labels`) returns scores [C, labels] fp32 of the
    candidates, at their last tokens, equal on every tensor-parallel rank. Forward only: no stage
    trains a reward model.
    """

    def __init__(
        self,
        config: TransformerConfig,
        block: TransformerBlockSubmodules,
        spec: ModelSpec,
        *,
        is_first_stage: bool,
        is_last_stage: bool,
    ) -> None:
        """Allocate uninitialised parameters on this device: weights come from a checkpoint."""
        super().__init__(
            config=config,
            transformer_layer_spec=block,
            vocab_size=spec.padded_vocab_size,
            max_sequence_length=spec.max_positions,
            pre_process=is_first_stage,
            post_process=is_last_stage,
            share_embeddings_and_output_weights=spec.tied_embeddings,
            position_embedding_type="none" if spec.rotary is not None else "learned_absolute",
        )
        self.spec = spec
        if is_first_stage:
            adapt_embedding(self.embedding)
        if is_last_stage and spec.labels is not None:
            self.output_layer = ScoreHead(spec.labels, spec.hidden_size, config.params_dtype)

    def output_weight(self) -> Tensor:
        """Return this rank's output projection [Vp/t, H]; on the last pipeline stage only."""
        weight: Tensor
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        return weight

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return megatron-core's sharded tensors of this pipeline stage, without `_extra_state`.

        That is pickled fp8 state, which is empty. The head of a reward model is called
        `score.weight` in checkpoints.
        """
        state: dict[str, Any] = super().sharded_state_dict(*args, **kwargs)
        if self.spec.labels is not None and self.post_process:
            state["output_layer.weight"].key = "score.weight"
        return {key: value for key, value in state.items() if not key.endswith("._extra_state")}

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *args: Any,
        packed_seq_params: Layout,
        **kwargs: Any,
    ) -> tuple[Tensor | None, None, None, None, None, None]:
        """Embed on the first pipeline stage.

        Core attention rotates by the layout's positions: no angles here.
        """
        if not self.pre_process:
            return None, None, None, None, None, None
        hidden = self.embedding(input_ids=input_ids, position_ids=position_ids)
        if self.spec.embedding_scale is not None:
            hidden = hidden * torch.tensor(self.spec.embedding_scale, dtype=hidden.dtype)
        return hidden, None, None, None, None, None

    def _postprocess(self, hidden_states: Tensor, *args: Any, packed_seq_params: Layout, **kwargs: Any) -> Tensor:
        """Return hidden states, on the last pipeline stage those that the layout selects.

        That is [M, H] of the predicting tokens, or for a reward model scores [C, labels].
        """
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.pg_collection.tp)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=self.pg_collection.tp)
        if self.spec.labels is not None:
            scores: Tensor = self.output_layer(packed_seq_params.candidate_ends(hidden_states))
            return scores
        return packed_seq_params.predicting(hidden_states)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_RECOMPUTE: dict[str, dict[str, object]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def check_topology(spec: ModelSpec, parallel: ParallelConfig) -> None:
    """Raise TopologyError unless every dimension that is cut can be cut evenly.

    Needs no process group.
    """
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
    if spec.experts is not None:
        check_experts(spec.family, spec.experts, parallel)
    elif parallel.expert > 1:
        raise TopologyError(
            "parallel.expert",
            f"{parallel.expert}, but the model ({spec.family}) has no experts",
            expected="1",
            fix="remove parallel.expert; parallel.tensor and parallel.pipeline cut a dense model",
        )


def check_attention(spec: ModelSpec, device: torch.device, compute: ComputeConfig) -> None:
    """Raise ConfigError if attention would take the CUDA operator, which has no such head size."""
    size = spec.head_dim
    fits = size <= FLASH_LARGEST_HEAD and size % FLASH_HEAD_MULTIPLE == 0
    if may_use_flash_varlen(device, DTYPES[compute.precision], softcap=spec.attention_softcap) and not fits:
        raise ConfigError(
            "compute.precision",
            f"{compute.precision} on a GPU takes flash attention, which takes no heads of size {size}",
            expected=f"heads of at most {FLASH_LARGEST_HEAD}, a multiple of {FLASH_HEAD_MULTIPLE}",
            fix="set compute.precision=fp32, which takes matrix products, or run on the CPU",
        )


def build_policy(spec: ModelSpec, topology: Topology, compute: ComputeConfig) -> PolicyModel:
    """Build this rank's pipeline stage and tensor shard, uninitialised, on the topology's device.

    Parameters are in `compute.precision`. Raises TopologyError if the model cannot be cut that way,
    and ConfigError if its heads do not fit the attention operator of the device.
    """
    check_topology(spec, topology.parallel)
    check_attention(spec, topology.device, compute)
    config = transformer_config(spec, topology, compute)
    per_stage = spec.layers // topology.pipeline_size
    first = topology.pipeline_rank * per_stage
    block = block_spec(spec, config, range(first, first + per_stage))
    policy = PolicyModel(
        config, block, spec, is_first_stage=topology.is_first_stage, is_last_stage=topology.is_last_stage
    )
    _mark_tensor_parallel(policy)
    policy.to(topology.device)
    if topology.is_first_stage and spec.rotary is None:
        policy.embedding.position_embeddings.to(dtype=config.params_dtype)  # megatron-core makes them in fp32
    return policy


def _mark_tensor_parallel(policy: PolicyModel) -> None:
    """Mark every sharded weight as sharded, as megatron-core's initialisation would.

    megatron-core 0.16 marks weights only when it also initialises them. An unmarked weight counts
    as replicated over the tensor group: its gradient on tensor ranks above 0 would be left out of
    the gradient norm.
    """
    cut_along = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in policy.modules():
        dim = next((dim for kind, dim in cut_along.items() if isinstance(module, kind)), None)
        weight = vars(module)["_parameters"].get("weight")
        if dim is not None and weight is not None and "tensor_model_parallel" not in vars(weight):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def transformer_config(spec: ModelSpec, topology: Topology, compute: ComputeConfig) -> TransformerConfig:
    """Build megatron-core's configuration of the model at this topology."""
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
        # Not called: BlockActivation of models/layers.py is in its place, which megatron-core permits for these.
        "activation_func": functional.silu if spec.activation == "silu" else functional.gelu,
        "use_te_activation_func": True,
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
        # Micro-batches differ in length; megatron-core allows that only with this dispatcher.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        # The loss function returns (sum over groups, number of groups, report): an exact global
        # mean.
        "calculate_per_token_loss": True,
        "perform_initialization": False,
        "deallocate_pipeline_outputs": True,
        "bias_activation_fusion": False,
        # It would wait for the device after every transfer, for the sake of old versions of
        # PyTorch. Today the stream that sends and receives waits for the transfer: what it reads
        # is there, and memory that it frees is used again only behind it.
        "batch_p2p_sync": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        # Only where parameters have gradient buffers: models/main_grad.py.
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        **(expert_settings(spec.experts, topology) if spec.experts is not None else {}),
        **_RECOMPUTE[compute.recompute],
    }
    return TransformerConfig(**settings)
