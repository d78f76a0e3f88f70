"""What the worker processes of the parity tests do. Run by tests/multiprocess/harness.py on every rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from exo_megatron.config.sections import ModelConfig
from exo_megatron.config.stages import AlignConfig, ExportConfig, ImportConfig, SftConfig
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.stages.align import run_align
from exo_megatron.stages.export_hf import run_export
from exo_megatron.stages.import_hf import run_import
from exo_megatron.stages.sft import run_sft
from exo_megatron.training import step as step_module
from exo_megatron.training.objectives import DeviceBatch, UnitSum
from exo_megatron.training.optimizer import Trainee
from tests.reference.hf_names import local_tensors


@dataclass(frozen=True)
class RankRecord:
    """What one rank of a run saw. Tensors have megatron's names, layers numbered over the whole model.

    gradients: of each step, before clipping, complete over the data-parallel group (only of data rank 0).
    groups: of each step, the K of every group of each of this rank's micro-batches.
    """

    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    gradients: list[dict[str, Tensor]]
    groups: list[list[tuple[int, ...]]]
    weights: dict[str, Tensor]
    metrics: list[dict[str, Any]]


def import_checkpoint(runtime: Runtime, *, hf: Path, output: Path) -> None:
    """HF directory to distributed checkpoint."""
    run_import(ImportConfig(hf=hf, output=output, dtype="keep"), runtime)


def export_checkpoint(runtime: Runtime, *, checkpoint: Path, output: Path) -> None:
    """Distributed checkpoint to HF directory."""
    run_export(ExportConfig(model=ModelConfig(checkpoint=checkpoint), output=output, dtype="keep"), runtime)


def align(runtime: Runtime, *, config: dict[str, Any]) -> RankRecord:
    """`run_align` as it is, with a look at the gradient buffers between the backward passes and Adam."""
    settings = AlignConfig(**config)
    return _watched(settings.output, lambda: run_align(settings, runtime))


def sft(runtime: Runtime, *, config: dict[str, Any]) -> RankRecord:
    """The same for `run_sft`."""
    settings = SftConfig(**config)
    return _watched(settings.output, lambda: run_sft(settings, runtime))


def _watched(output: Path, run: Callable[[], None]) -> RankRecord:
    watcher = _Watcher()
    original = step_module.forward_gradients

    def watched(trainee: Trainee, batches: list[DeviceBatch], *rest: Any) -> list[UnitSum]:
        reports = original(trainee, batches, *rest)
        watcher.look(trainee, batches)
        return reports

    step_module.forward_gradients = watched
    try:
        run()
    finally:
        step_module.forward_gradients = original
    return watcher.record(output)


class _Watcher:
    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.groups: list[list[tuple[int, ...]]] = []

    def look(self, trainee: Trainee, batches: list[DeviceBatch]) -> None:
        self.trainee = trainee
        self.groups.append([batch.layout.group_sizes for batch in batches])
        complete = complete_gradients(trainee)
        if trainee.policy.topology.data_rank == 0:
            self.gradients.append(local_tensors(trainee.policy.model, lambda parameter: complete[parameter]))

    def record(self, output: Path) -> RankRecord:
        topology = self.trainee.policy.topology
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return RankRecord(
            topology.tensor_rank,
            topology.pipeline_rank,
            topology.data_rank,
            self.gradients,
            self.groups,
            local_tensors(self.trainee.policy.model, lambda parameter: parameter),
            [json.loads(line) for line in lines],
        )


def complete_gradients(trainee: Trainee) -> dict[torch.nn.Parameter, Tensor]:
    """Each rank of the data-parallel group holds its reduced shard of every bucket: put copies of them together."""
    topology = trainee.policy.topology
    model: DistributedDataParallel = trainee.model
    gradients: dict[torch.nn.Parameter, Tensor] = {}
    for buffer in model.buffers:
        whole = torch.empty_like(buffer.grad_data)
        for bucket in buffer.buckets:
            size = bucket.grad_data.numel() // topology.data_size
            shards = [torch.empty_like(bucket.grad_data[:size]) for _ in range(topology.data_size)]
            own = bucket.grad_data[topology.data_rank * size : (topology.data_rank + 1) * size].clone()
            dist.all_gather(shards, own, group=topology.data_group)
            whole[bucket.offset : bucket.offset + bucket.grad_data.numel()] = torch.cat(shards)
        for parameter, (start, end, _) in buffer.param_index_map.items():
            gradients[parameter] = whole[start:end].view(parameter.shape)
    return gradients
