"""Operations of a training step whose result the host must wait for on a GPU. Run by tests/multiprocess/harness.py."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from exo_megatron.config.sections import ComputeConfig, LossConfig
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.training.step import forward_gradients, plan_step
from tools.bench.lengths import HH
from tools.bench.models import Shape, matched_models, random_groups
from tools.bench.training import OurSteps

# Results whose value or size the host needs to go on.
WAITING = (
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "_unique2",
    "unique_consecutive",
    "repeat_interleave.Tensor",
)


class Watch:
    """Notes the caller of every such operation: the innermost line that is neither torch's nor of this file."""

    def __init__(self) -> None:
        self.callers: list[str] = []
        self._modes = (_Operations(self), _Copies(self))

    def __enter__(self) -> Watch:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exception)

    def note(self) -> None:
        frames = [
            frame
            for frame in traceback.extract_stack()
            if "/torch/" not in frame.filename and frame.filename != __file__
        ]
        self.callers.append(f"{Path(frames[-1].filename).name}: {frames[-1].line}")


class _Operations(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if name.startswith(WAITING) or (name.startswith(("index.", "index_put")) and _has_mask(args[1])):
            self.watch.note()
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """What reads a tensor's memory on the CPU without an operation, and copies it there from a GPU."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
            self.watch.note()
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


def waits_of_a_step(runtime: Runtime, *, max_tokens: int, logits_memory_mib: float) -> list[str]:
    """Forward and backward of one step; groups larger than max_tokens go in parts."""
    shape = Shape(hidden=64, layers=2, vocab=1999, head_dim=16)
    compute = ComputeConfig(precision="fp32", max_tokens_per_microbatch=max_tokens, logits_memory_mib=logits_memory_mib)
    with matched_models(shape, runtime, compute) as matched:
        ours = OurSteps.of(matched, LossConfig(kind="exo_rw"))
        groups = ours.stored(random_groups(HH.draw(6, 3), shape.vocab))
        batches = plan_step(ours.trainee, groups, ours.objective)
        with Watch() as watch:
            forward_gradients(ours.trainee, batches.microbatches, ours.objective, batches.oversized)
        oversized = 0 if batches.oversized is None else batches.oversized.count
        return [*watch.callers, f"{oversized} oversized groups, {len(batches.microbatches)} micro-batches"]
