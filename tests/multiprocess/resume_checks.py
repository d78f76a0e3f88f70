"""Runs of `align` inside a worker process, stopped after a number of steps as if by a crash."""

from __future__ import annotations

from typing import Any

from exo_megatron.config.stages import AlignConfig
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.training import trainer as trainer_module
from exo_megatron.training.align import run_align
from exo_megatron.training.step import StepResult


class _Crash(Exception):
    pass


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
