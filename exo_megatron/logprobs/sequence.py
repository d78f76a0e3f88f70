"""Log-probs of the candidates of a packed row."""

from __future__ import annotations

import torch
from torch import Tensor

from exo_megatron.logprobs.projection import VocabShard
from exo_megatron.logprobs.tiles import plan_tiles
from exo_megatron.logprobs.vocab_parallel import sharded_logprobs
from exo_megatron.models.layout import GroupLayout
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.topology import Topology


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    layout: GroupLayout,
    *,
    spec: ModelSpec,
    temperature: float,
    memory_mib: float,
    topology: Topology,
) -> Tensor:
    """[N] fp32 log-probs of the row's response tokens, in the layout's token order; differentiable.

    hidden [M, H]: what the last stage returned; weight [Vp/t, H]: its `output_weight()`. memory_mib: for logits on
    this rank; they are kept for the backward pass as far as that goes. One all-gather of 2 M + N floats over the
    tensor group.
    """
    shard = VocabShard(topology.tensor_group, topology.tensor_rank, topology.tensor_size, spec.vocab_size)
    tiling = plan_tiles(hidden.shape[0], shard.valid(weight.shape[0]), weight, memory_mib=memory_mib)
    return sharded_logprobs(
        hidden,
        weight,
        layout.token_row,
        layout.token_target,
        shard,
        temperature=temperature,
        tiling=tiling,
        softcap=spec.logit_softcap,
    )


def sequence_logprobs(token_logps: Tensor, layout: GroupLayout) -> Tensor:
    """log pi(y_k | x) of each candidate, [C] fp64, in nats: its per-token log-probs [N] summed.

    fp64, because log-ratios are small differences of sums of several hundred nats. Each candidate's sum runs over
    its own tokens in natural order, so it does not depend on what else is in the row.
    """
    if token_logps.shape[0] == 0:
        return token_logps.double()
    natural = token_logps.new_zeros(token_logps.shape).index_copy(0, layout.token_order, token_logps)
    return torch.segment_reduce(natural.double(), "sum", lengths=layout.candidate_lengths, unsafe=True)
