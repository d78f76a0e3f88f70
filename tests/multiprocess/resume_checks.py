"""Runs of `align` inside a worker process, stopped after a number of steps as if by a crash."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from torch import Tensor

from exo_megatron.config.stages import AlignConfig
from exo_megatron.errors import ExoError
from exo_megatron.execution.policy import Policy
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.stages.align import run_align
from exo_megatron.training import trainer as trainer_module
from exo_megatron.training.objectives import AlignObjective, DeviceBatch, UnitSum
from exo_megatron.training.optimizer import Trainee
from exo_megatron.training.step import StepResult


class _Crash(Exception):
    pass


def error_of(runtime: Runtime, *, config: dict[str, Any], nan_step: int | None = None) -> tuple[str, str, int]:
    """Class, message and exit code of the error that a run ends with. nan_step: a NaN on the last rank in that step."""
    calls = 0
    original = AlignObjective.__call__

    def poisoned(self: AlignObjective, hidden: Tensor, batch: DeviceBatch, policy: Policy) -> UnitSum:
        nonlocal calls
        calls += 1  # one micro-batch per step
        result = original(self, hidden, batch, policy)
        if calls == nan_step and runtime.rank == runtime.world_size - 1:
            return UnitSum(result.total * float("nan"), result.count, result.statistics)
        return result

    AlignObjective.__call__ = poisoned
    try:
        run_align(AlignConfig(**config), runtime)
    except ExoError as error:
        return type(error).__name__, str(error), error.exit_code
    finally:
        AlignObjective.__call__ = original
    raise RuntimeError("the run ended without an error")


def saved_bytes(runtime: Runtime, *, config: dict[str, Any]) -> set[int]:
    """Bytes of weights and optimizer state that this rank gave to each of a run's saves."""
    original = Trainee.sharded_state
    seen: set[int] = set()

    def watched(self: Trainee, *, loading: bool) -> dict[str, Any]:
        state = original(self, loading=loading)
        shards = nested_values(state["optimizer"]["param_state"])
        seen.add(sum(shard.data.nbytes for shard in shards))
        return state

    Trainee.sharded_state = watched
    try:
        run_align(AlignConfig(**config), runtime)
    finally:
        Trainee.sharded_state = original
    return seen


def align_in_pieces(runtime: Runtime, *, pieces: list[tuple[dict[str, Any], int]], last: dict[str, Any]) -> None:
    """Start the run of each configuration and let it crash before it takes more than that many steps; then `last`."""
    for config, steps in pieces:
        _crash_after(runtime, config, steps)
    run_align(AlignConfig(**last), runtime)


def _crash_after(runtime: Runtime, config: dict[str, Any], steps: int) -> None:
    original = trainer_module.train_step
    left = steps

    def limited(*args: Any, **kwargs: Any) -> StepResult:
        nonlocal left
        if left == 0:
            raise _Crash
        left -= 1
        return original(*args, **kwargs)

    trainer_module.train_step = limited
    try:
        run_align(AlignConfig(**config), runtime)
    except _Crash:
        return
    finally:
        trainer_module.train_step = original
    raise RuntimeError(f"the run ended within {steps} steps")
