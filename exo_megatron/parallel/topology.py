"""How the world is cut for one stage: tensor x pipeline x data parallel ranks and their groups."""

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
    """This rank's place in the grid. Ranks are laid out tensor fastest, then data, then pipeline."""

    tensor_size: int
    tensor_rank: int
    tensor_group: ProcessGroup
    pipeline_size: int
    pipeline_rank: int
    pipeline_group: ProcessGroup
    data_size: int
    data_rank: int
    data_group: ProcessGroup
    sequence_parallel: bool
    first_stage_rank: int
    last_stage_rank: int
    device: torch.device

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def row_multiple(self) -> int:
        """Packed rows must be a multiple of this many tokens."""
        return self.tensor_size if self.sequence_parallel else 1


@contextmanager
def model_parallel(runtime: Runtime, parallel: ParallelConfig, *, seed: int) -> Iterator[Topology]:
    """Create the groups of one stage and destroy them after it; stages of one program may differ in topology.

    Collective over the world. Raises TopologyError if tensor x pipeline does not divide the world size.
    """
    model_size = parallel.tensor * parallel.pipeline
    if runtime.world_size % model_size:
        raise TopologyError(
            "parallel",
            f"tensor {parallel.tensor} x pipeline {parallel.pipeline} = {model_size} does not divide "
            f"the world size {runtime.world_size}",
            expected=f"a multiple of {model_size} processes",
            fix="change parallel.tensor or parallel.pipeline, or start another number of processes",
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor, pipeline_model_parallel_size=parallel.pipeline
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    try:
        yield _describe(runtime, parallel)
    finally:
        parallel_state.destroy_model_parallel()


def _describe(runtime: Runtime, parallel: ParallelConfig) -> Topology:
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    pipeline_ranks = torch.distributed.get_process_group_ranks(pipeline_group)
    return Topology(
        tensor_size=parallel.tensor,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_size=parallel.pipeline,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_group=pipeline_group,
        data_size=parallel_state.get_data_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_group=parallel_state.get_data_parallel_group(),
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        first_stage_rank=pipeline_ranks[0],
        last_stage_rank=pipeline_ranks[-1],
        device=runtime.device,
    )
