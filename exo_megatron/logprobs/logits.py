"""Whole logits, where something needs them all: drawing tokens, comparing models. Training never makes them."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from exo_megatron.models.products import product
from exo_megatron.models.softcap import soft_cap_
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.topology import Topology


def gathered_logits(hidden: Tensor, weight: Tensor, spec: ModelSpec, topology: Topology) -> Tensor:
    """[M, vocab_size] fp32 on every rank of the tensor group, by one all-gather over it.

    hidden [M, H]: complete on every rank; weight [Vp / t, H]: the last stage's `output_weight()`.
    """
    local = soft_cap_(product(hidden, weight.t()), spec.logit_softcap)
    if topology.tensor_size > 1:
        shards = local.new_empty(topology.tensor_size, *local.shape)
        dist.all_gather(list(shards.unbind()), local.contiguous(), group=topology.tensor_group)
        local = shards.transpose(0, 1).flatten(1)
    return local[:, : spec.vocab_size]
