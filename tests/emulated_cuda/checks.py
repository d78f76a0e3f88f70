"""What the ranks with an emulated CUDA device do. Run by tests/multiprocess/harness.py on every rank."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from exo_megatron.parallel.runtime import Runtime
from tests.emulated_cuda.emulation import flash_in_fp32
from tests.multiprocess import align_checks
from tests.multiprocess.align_checks import RankRecord


def run(runtime: Runtime, *, stage: str, config: dict[str, Any], flash: bool) -> RankRecord:
    """A stage of tests/multiprocess/align_checks.py; with `flash` attention takes the flash operator in fp32, too."""
    if runtime.device.type != "cuda":
        raise ValueError(f"the device is {runtime.device}")
    with flash_in_fp32() if flash else nullcontext():
        record: RankRecord = vars(align_checks)[stage](runtime, config=config)
    return replace(record, **{field.name: _on_cpu(getattr(record, field.name)) for field in fields(record)})


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(each) for key, each in value.items()}
    return [_on_cpu(each) for each in value] if isinstance(value, list) else value
