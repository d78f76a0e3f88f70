"""Division of the world for one stage into tensor x pipeline x data parallel ranks, with groups.

Experts are divided over the same ranks, the tensor ranks first. With E expert ranks and T tensor
ranks: where E divides T, the experts of a layer are dealt to E parts of the tensor group and each
expert is cut T / E ways. Where E is a multiple of T, every expert is whole and E / T model copies
(neighbours in the data group) share one set of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed import ProcessGroup

from exo_megatron.config.sections import ParallelConfig
from exo_megatron.errors import TopologyError
from exo_megatron.parallel.runtime import Runtime


@dataclass(frozen=True)
class Topology:
    """This rank's place among all: ranks are laid out tensor fastest, then data, then pipeline."""

    parallel: ParallelConfig
    tensor_size: int
    tensor_rank: int
    tensor_group: ProcessGroup
    pipeline_size: int
    pipeline_rank: int
    pipeline_group: ProcessGroup
    data_size: int
    data_rank: int
    data_group: ProcessGroup
    expert_size: int
    expert_group: ProcessGroup
    sequence_parallel: bool
    first_stage_rank: int
    last_stage_rank: int
    device: torch.device

    @property
    def is_first_stage(self) -> bool:
        """True if this rank holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True if this rank holds the output layer."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def shares_experts(self) -> bool:
        """True if model copies share experts, so that they must make equally many passes."""
        return self.expert_size > self.tensor_size

    @property
    def token_multiple(self) -> int:
        """Number of tokens of which the length of every packed sequence must be a multiple."""
        return self.parallel.token_multiple


@contextmanager
def model_parallel(runtime: Runtime, parallel: ParallelConfig, *, seed: int) -> Iterator[Topology]:
    """Create the groups of one stage and destroy them after it; stages may differ in topology.

    Collective over the world. Raises TopologyError if the sizes do not divide each other or the
    world size.
    """
    _check_world(parallel, runtime.world_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    try:
        yield _describe(runtime, parallel)
    except BaseException:
        parallel_state.destroy_model_parallel()  # other ranks may not be here: nothing to wait for
        raise
    runtime.barrier()  # a group that one rank has left fails under the others
    _destroy_groups()


def _destroy_groups() -> None:
    """Release the threads and communicators of the groups, which megatron-core only forgets."""
    for group in parallel_state._global_process_group_list or ():
        if group is not None:  # the world's own
            torch.distributed.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def check_expert_cut(parallel: ParallelConfig) -> None:
    """Raise TopologyError unless one of parallel.tensor and parallel.expert divides the other.

    Needs no process group.
    """
    if parallel.tensor % parallel.expert and parallel.expert % parallel.tensor:
        raise TopologyError(
            "parallel.expert",
            f"{parallel.expert} neither divides parallel.tensor {parallel.tensor} nor is a multiple of it",
            expected=f"a divisor or a multiple of {parallel.tensor}",
            fix="change parallel.expert or parallel.tensor",
        )


def _check_world(parallel: ParallelConfig, world_size: int) -> None:
    check_expert_cut(parallel)
    if world_size % parallel.processes:
        copies = parallel.expert > parallel.tensor
        larger = f"expert {parallel.expert}" if copies else f"tensor {parallel.tensor}"
        cut = f"{larger} x pipeline {parallel.pipeline} = {parallel.processes}"
        raise TopologyError(
            "parallel",
            f"{cut} does not divide the world size {world_size}",
            expected=f"a multiple of {parallel.processes} processes",
            fix="change the sizes in parallel, or start another number of processes",
        )


def _describe(runtime: Runtime, parallel: ParallelConfig) -> Topology:
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    pipeline_ranks = torch.distributed.get_process_group_ranks(pipeline_group)
    return Topology(
        parallel=parallel,
        tensor_size=parallel.tensor,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_size=parallel.pipeline,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_group=pipeline_group,
        data_size=parallel_state.get_data_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_group=parallel_state.get_data_parallel_group(),
        expert_size=parallel.expert,
        expert_group=parallel_state.get_expert_model_parallel_group(),
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        first_stage_rank=pipeline_ranks[0],
        last_stage_rank=pipeline_ranks[-1],
        device=runtime.device,
    )
