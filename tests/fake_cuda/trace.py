"""What a step does on fake CUDA, as it happens: operators, collectives, waits of the host, copies to the device.

`RECORD` is the record of this process. Places are "file:function", the innermost of megatron-core or the project, and
behind "<-" the innermost of the project if that is another one.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Record:
    """What was seen.

    phase: the part of the work that is being done, which every wait and copy is noted with.
    uploads: copies to the device; pageable: those of them for which the host waits, or the present stream.
    unsafe: uses of memory that another stream may still write or have taken.
    wide: largest fp32 matrix that was made before the optimizer, in bytes, and where.
    """

    phase: str = "none"
    operators: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)
    bad_collectives: list[str] = field(default_factory=list)
    waits: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    pageable: Counter[str] = field(default_factory=Counter)
    unsafe: Counter[str] = field(default_factory=Counter)
    wide: tuple[int, str] = (0, "")

    def clear(self) -> None:
        """Forget everything so far."""
        counters = (self.operators, self.collectives, self.waits, self.uploads, self.pageable, self.unsafe)
        for each in (*counters, self.bad_collectives):
            each.clear()
        self.wide = (0, "")

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Note what happens in the block under this phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def wait(self, what: str) -> None:
        """Note that the host waits for the device."""
        self.waits[f"{self.phase}: {what} at {place()}"] += 1

    def upload(self, *, ahead: bool) -> None:
        """Note a copy from host to device. ahead: from pinned memory, not waited for, on a stream of its own."""
        self.uploads[f"{self.phase}: at {place()}"] += 1
        if not ahead:
            self.pageable[f"{self.phase}: at {place()}"] += 1

    def made(self, tensor: torch.Tensor) -> None:
        """Note a matrix that an operator has made. The optimizer makes its state."""
        if self.phase != "optimizer" and tensor.dtype == torch.float32 and tensor.nbytes > self.wide[0]:
            self.wide = (tensor.nbytes, f"{self.phase}: {list(tensor.shape)} at {place()}")

    def collective(self, name: str, tensor: torch.Tensor) -> None:
        """Note a tensor that a collective or a transfer reads or writes."""
        self.collectives[f"{name} of {str(tensor.dtype).removeprefix('torch.')} at {place()}"] += 1
        if tensor.device.type != "cuda":
            self.bad_collectives.append(f"{name} on {tensor.device} at {place()}")
        elif not tensor.is_contiguous():
            self.bad_collectives.append(f"{name} not contiguous at {place()}")


RECORD = Record()
PROJECT = f"{Path(__file__).resolve().parents[2] / 'exo_megatron'}/"


def place() -> str:
    """Where the caller was called, see the module."""
    innermost = None
    for frame, _ in traceback.walk_stack(None):
        path = frame.f_code.co_filename
        in_megatron = path.rpartition("/megatron/core/")
        if path.startswith(PROJECT):
            here = f"exo_megatron/{path.removeprefix(PROJECT)}:{frame.f_code.co_name}"
            return here if innermost is None else f"{innermost} <- {here}"
        if in_megatron[1] and innermost is None:
            innermost = f"megatron/core/{in_megatron[2]}:{frame.f_code.co_name}"
    return innermost or "autograd"
