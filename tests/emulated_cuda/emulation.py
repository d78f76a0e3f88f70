"""Gives this process a CUDA device that computes on the CPU. To be installed before megatron-core is imported."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.emulated_cuda import flash, norms, products
from tests.fake_cuda import device

OPERATORS: dict[str, Callable[..., object]] = {
    "_flash_attention_forward": flash.forward,
    "_flash_attention_backward": flash.backward,
    "_fused_rms_norm": norms.forward,
    "_fused_rms_norm_backward": norms.backward,
    "mm.dtype": products.product,
    "bmm.dtype": products.product,
    "mm.dtype_out": products.product_out,
    "bmm.dtype_out": products.product_out,
    "addmm.dtype_out": products.added,
    "_grouped_mm": products.grouped,
}
CALLS: Counter[str] = Counter()
"""How often each of them was called in this process."""
LIBRARY = torch.library.Library("aten", "IMPL")


def install() -> None:
    """Needs the libraries of tests/fake_cuda and of this folder, see libraries.py."""
    move: Any = nn.Module.to  # which is replaced for fake tensors, and right for tensors with data
    device.install()
    of_module: Any = nn.Module
    of_module.to = move
    properties = torch.cuda.get_device_properties(0)
    properties.uuid = f"emulated-{os.environ.get('LOCAL_RANK', 0)}"  # every rank sees a device of its own
    importlib.import_module("exo_emulated_cuda_memory")
    for name, operator in OPERATORS.items():
        LIBRARY.impl(name, _counted(name, operator), "CUDA", allow_override=True)
    for module in (dist, dist.distributed_c10d):
        for name in ("init_process_group", "new_group"):
            vars(module)[name] = _over_gloo(vars(module)[name])


def _counted(name: str, operator: Callable[..., object]) -> Callable[..., object]:
    def counted(*args: Any, **kwargs: Any) -> object:
        CALLS[name] += 1
        return operator(*args, **kwargs)

    return counted


def _over_gloo(start: Callable[..., Any]) -> Callable[..., Any]:
    """Give a group that is asked of NCCL gloo, which the library of this folder lets take CUDA tensors."""

    def started(*args: Any, **kwargs: Any) -> Any:
        args = tuple("gloo" if arg == "nccl" else arg for arg in args)
        return start(*args, **{key: "gloo" if value == "nccl" else value for key, value in kwargs.items()})

    return started


@contextmanager
def flash_in_fp32() -> Iterator[None]:
    """Let fp32 take the flash operator, which on a GPU has no fp32, so that it can be compared to 1e-5."""
    kernels = importlib.import_module("exo_megatron.models.attention.kernels")
    original = kernels.may_use_flash_varlen
    vars(kernels)["may_use_flash_varlen"] = _any_dtype
    try:
        yield
    finally:
        vars(kernels)["may_use_flash_varlen"] = original


def _any_dtype(device: torch.device, dtype: torch.dtype, *, softcap: float | None) -> bool:
    return device.type == "cuda" and softcap is None
