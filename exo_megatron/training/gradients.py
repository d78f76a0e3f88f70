"""Division, norm and clipping of reduced gradients, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from exo_megatron.parallel.topology import Topology


def finalize_gradients(
    models: Sequence[DistributedDataParallel], num_units: Tensor, *, topology: Topology, **settings: Any
) -> None:
    """Reduce gradients and divide them by the global number of units, as megatron-core's schedule asks.

    megatron-core 0.16 would read the number to compare it with 0. Collectives: those of
    megatron-core's finalize_model_grads, one broadcast over the pipeline group and one all-reduce
    over the data group.

    Args:
        models: the one model.
        num_units: [] int, those of this rank's micro-batches on the last pipeline stage; overwritten
            with the global number.
        topology: gives the groups.
        **settings: of finalize_model_grads.
    """
    finalize_model_grads(models, None, **settings)
    dist.broadcast(num_units, src=topology.last_stage_rank, group=topology.pipeline_group)
    dist.all_reduce(num_units, group=topology.data_group)
    for model in models:
        model.scale_gradients(1.0 / num_units.clamp(min=1))


@torch.no_grad()
def update_weights(optimizer: MegatronOptimizer, clip: float | None) -> Tensor:
    """Clip gradients by their global norm and run Adam.

    One all-reduce of a number over the world; all-gather of weights over the data group.

    Args:
        optimizer: megatron-core's chained optimizer.
        clip: largest norm; None for no clipping.

    Returns:
        The norm [] fp64 before clipping, on the device, equal on every rank.
    """
    optimizer.prepare_grads()
    parts: list[DistributedOptimizer] = list(optimizer.chained_optimizers)
    norm = _global_norm(
        [gradient for part in parts for gradient in _distinct_gradients(part)],
        optimizer.get_grad_stats_parallel_group(),
    )
    if clip is not None:
        gradients = [each.grad for part in parts for each in part.get_parameters() if each.grad is not None]
        factor = (clip / (norm + 1e-6)).clamp(max=1.0).float()
        if gradients:
            torch._foreach_mul_(gradients, factor)
    optimizer.step_with_ready_grads()
    return norm


def _distinct_gradients(part: DistributedOptimizer) -> list[Tensor]:
    """List this rank's shards of gradients, each of a weight that several ranks hold on one of them."""
    names = ("get_grads_for_grad_norm", "get_main_grads_for_grad_norm")  # megatron-core 0.19 and 0.16
    method = next(name for name in names if hasattr(part, name))
    gradients: list[Tensor] = getattr(part, method)()
    return gradients


def _global_norm(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
    """Compute the norm [] fp64 of fp32 tensors of all ranks of the group; one all-reduce."""
    norms = torch._foreach_norm([gradient for gradient in gradients if gradient.numel()])
    device = torch.device(torch.cuda.current_device())
    total = torch.stack(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return total.sqrt()
