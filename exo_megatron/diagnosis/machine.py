"""Speeds that this device reaches by itself: matrix products and copies, timed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from exo_megatron.diagnosis.timing import timed


@dataclass(frozen=True)
class SquareProducts:
    """Products of two square matrices, `times` of them, into a third."""

    matrices: tuple[Tensor, Tensor, Tensor]
    times: int

    @classmethod
    def of(cls, size: int, dtype: torch.dtype, device: torch.device, *, seconds: float) -> SquareProducts:
        """Make as many products as take about so many seconds."""
        left, right, result = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(3))
        one = cls((left, right, result), 1)
        one()
        return cls((left, right, result), math.ceil(seconds / timed(one)))

    @property
    def flops(self) -> float:
        """FLOPs of all products."""
        return 2.0 * self.matrices[0].shape[0] ** 3 * self.times

    def __call__(self) -> None:
        left, right, result = self.matrices
        for _ in range(self.times):
            torch.mm(left, right, out=result)


SHEET_FLOPS = {
    "A100": 312e12,
    "A800": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "L40S": 362e12,
    "B200": 2250e12,
}
"""Dense bf16 FLOP/s by data sheet; of names that contain each other, the longest counts."""
COPY_BYTES = 2**28
SMALL_COPY_BYTES = 2**24


@dataclass(frozen=True)
class Machine:
    """Speeds of one device, measured.

    Attributes:
        flops: FLOP/s of square products in the precision of the speed checks.
        bytes_per_second: read and written by a copy, both counted.
        sheet_flops: FLOP/s by data sheet; None for a device that is not known.
    """

    flops: float
    bytes_per_second: float
    sheet_flops: float | None

    @property
    def mfu_flops(self) -> float:
        """The FLOP/s to which MFU relates: those of the data sheet, measured ones if unknown."""
        return self.sheet_flops or self.flops


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Time products and copies for about a second on CUDA, for a few hundredths on the CPU."""
    on_cuda = device.type == "cuda"
    size, seconds = (8192, 0.5) if on_cuda else (256, 0.02)
    products = SquareProducts.of(size, dtype, device, seconds=seconds)
    bytes_ = COPY_BYTES if on_cuda else SMALL_COPY_BYTES
    source = torch.zeros(bytes_, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    copies = 20

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source)

    flops = max(products.flops / timed(products) for _ in range(2))
    speed = max(2 * bytes_ * copies / timed(copy) for _ in range(2))
    return Machine(flops, speed, sheet_flops(torch.cuda.get_device_name(device)) if on_cuda else None)


def sheet_flops(name: str) -> float | None:
    """Find the FLOP/s of a device by its name, such as "NVIDIA A100-SXM4-80GB"."""
    found = [known for known in SHEET_FLOPS if known in name]
    return SHEET_FLOPS[max(found, key=len)] if found else None
