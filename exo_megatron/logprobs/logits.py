"""Logits of the whole vocabulary, for drawing tokens and comparing models.

Training never makes them.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from exo_megatron.models.numerics import product, soft_cap_
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.topology import Topology


def gathered_logits(hidden: Tensor, weight: Tensor, spec: ModelSpec, topology: Topology) -> Tensor:
    """Compute logits [M, vocab_size] fp32 on every rank of the tensor group.

    One all-gather over the tensor group.

    Args:
        hidden: [M, H], complete on every rank.
        weight: [Vp / t, H], `output_weight()` of the last pipeline stage.
        spec: gives the soft cap and the vocabulary without padding.
        topology: gives the tensor group.
    """
    local = soft_cap_(product(hidden, weight.t()), spec.logit_softcap)
    if topology.tensor_size > 1:
        shards = local.new_empty(topology.tensor_size, *local.shape)
        dist.all_gather(list(shards.unbind()), local.contiguous(), group=topology.tensor_group)
        local = shards.transpose(0, 1).flatten(1)
    return local[:, : spec.vocab_size]
