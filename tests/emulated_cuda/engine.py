"""Transformer Engine's own Python over a stand-in for its compiled part that computes.

The Python is that of its wheel on the package index, unpacked somewhere; it needs no CUDA. Of the compiled part there
is what training takes: one product of matrices, and the optimizer's kernels. Everything else can be named, which an
import does, and raises NotImplementedError when it is called.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

VERSION = "2.20.2"
FOLDER = "EXO_EMULATED_ENGINE"
"""The environment variable that names the folder with the unpacked wheel."""

DTYPES = ("kByte", "kInt32", "kFloat32", "kFloat16", "kBFloat16", "kFloat8E4M3", "kFloat8E5M2", "kFloat4E2M1")
BACKENDS = ("NVTE_No_Backend", "NVTE_F16_arbitrary_seqlen", "NVTE_FP8")
DEPENDENCIES = (
    *("onnx", "onnx.defs", "onnx_ir", "onnxscript", "onnxscript.ir", "onnxscript.onnx_opset", "onnxscript.values"),
    "einops",
)
"""For exports and for layers that we do not use."""
HALF = (torch.float16, torch.bfloat16)
CALLS: Counter[str] = Counter()
"""How often the product and the optimizer's kernels were called in this process."""


class _Named:
    """Something of the compiled part that is only named; parts of it are named, too."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, part: str) -> _Named:
        if part.startswith("__"):
            raise AttributeError(part)
        return _Named(f"{self.name}.{part}")

    def __call__(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"{self.name} is not in the stand-in for Transformer Engine's compiled part")

    def __int__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Named) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __or__(self, other: object) -> _Named:
        return self

    __ror__ = __or__


class _Compiled(ModuleType):
    def __getattr__(self, name: str) -> _Named:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name)


def install(folder: Path) -> None:
    """To be called before megatron-core is imported."""
    compiled = _Compiled("transformer_engine_torch")
    compiled.__spec__ = importlib.machinery.ModuleSpec("transformer_engine_torch", None)
    values: dict[str, object] = {
        "DType": IntEnum("DType", DTYPES, start=0),
        "NVTE_Fused_Attn_Backend": IntEnum("NVTE_Fused_Attn_Backend", BACKENDS, start=-1),
        "generic_gemm": product,
        "get_cudnn_version": lambda: 92400,
        "get_num_cublas_streams": lambda: 4,
        "multi_tensor_l2norm": l2norm,
        "multi_tensor_scale": scale,
        "multi_tensor_adam": adam,
    }
    vars(compiled).update(values)
    sys.modules["transformer_engine_torch"] = compiled
    for name in (*DEPENDENCIES, *_kernels(folder)):
        sys.modules[name] = MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None), __path__=[])
    sys.path.insert(0, str(folder))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its libraries are not loaded
    _import_common(folder / "transformer_engine" / "common")
    importlib.import_module("transformer_engine.pytorch")


def _kernels(folder: Path) -> list[str]:
    """Its modules of Triton kernels, which need Triton."""
    package = "transformer_engine.pytorch.triton"
    names = [path.stem for path in folder.joinpath(*package.split(".")).glob("*.py") if path.stem != "__init__"]
    return [package, *(f"{package}.{name}" for name in names)]


def _import_common(folder: Path) -> None:
    """Import transformer_engine.common ahead of its package, whose import would look for the compiled part."""
    name = "transformer_engine.common"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"no {name} in {folder}")
    common: Any = importlib.util.module_from_spec(spec)
    sys.modules[name] = common
    spec.loader.exec_module(common)
    common.load_framework_extension = lambda framework: None
    importlib.import_module("transformer_engine").common = common


def product(
    left: Tensor,
    transposed_left: bool,
    right: Tensor,
    transposed_right: bool,
    out: Tensor | None,
    quantizer: None,
    dtype: IntEnum | None,
    bias: Tensor | None,
    bias_dtype: IntEnum,
    gelu: bool,
    gelu_input: None,
    for_gradient: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    split_accumulator: bool,
    **unused: object,
) -> tuple[Tensor, Tensor | None, None, None]:
    """op(right) @ op(left), as cuBLAS has it by columns; sums in fp32, rounded once.

    bias: added, or its gradient returned second. out: overwritten, or added to.
    """
    CALLS["product"] += 1
    _require(quantizer is None and not gelu and unused.get("comm_overlap") is None, "a product with more than a bias")
    _require(left.is_cuda and right.is_cuda, "the operands must be on CUDA")
    _require(left.dtype == right.dtype, f"the operands have dtypes {left.dtype} and {right.dtype}")
    wide = torch.float32 if left.dtype in HALF else left.dtype
    rows, columns = (each.reshape(-1, each.shape[-1]).to(wide) for each in (right, left))
    rows = rows.t() if transposed_right else rows
    columns = columns.t() if transposed_left else columns
    result = rows @ columns
    if bias is not None and not for_gradient and bias.numel():
        result = result + bias.to(wide)
    of_bias = right.reshape(-1, right.shape[-1]).to(wide).sum(0) if bias is not None and for_gradient else None
    if out is None:
        kind = _DTYPES[int(dtype)] if dtype is not None else left.dtype
        leading = right.shape[:-1] if not transposed_right else rows.shape[:1]
        out = result.to(kind).view(*leading, result.shape[-1])
    else:
        _require(out.shape == result.shape, f"out has shape {tuple(out.shape)}, the product {tuple(result.shape)}")
        (out.add_ if accumulate else out.copy_)(result.to(out.dtype))
    return out, None if of_bias is None else of_bias.to(right.dtype), None, None


_DTYPES = {2: torch.float32, 3: torch.float16, 4: torch.bfloat16}


def l2norm(
    chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool
) -> tuple[Tensor, Tensor | None]:
    """The norm of all tensors together, fp32 [1]."""
    CALLS["l2norm"] += 1
    _require(not per_tensor, "norms of every tensor")
    _require(all(each.is_cuda and each.is_contiguous() for each in lists[0]), "tensors that are not contiguous on CUDA")
    squares = torch.stack([each.float().square().sum() for each in lists[0]])
    return squares.sum().sqrt().view(1), torch.zeros(1, device=overflow.device)


def scale(chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], factor: float) -> None:
    """Write factor times each of the first list to the second."""
    CALLS["scale"] += 1
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def adam(
    chunk: int,
    overflow: Tensor,
    lists: Sequence[Sequence[Tensor]],
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """One step of AdamW (mode 1): gradients, parameters, first and second moments, and main parameters if any."""
    CALLS["adam"] += 1
    _require(decoupled == 1 and bias_correction == 1, "an Adam that is not AdamW with bias correction")
    _require(type(step) is int, f"the step must be an int, not {type(step)}")
    for gradient, parameter, first, second, *main in zip(*lists, strict=True):
        value = (main[0] if main else parameter).float()
        first.lerp_(gradient.float(), 1 - beta1)
        second.mul_(beta2).addcmul_(gradient.float(), gradient.float(), value=1 - beta2)
        root = (second / (1 - beta2**step)).sqrt() + eps
        value = value - rate * (first / (1 - beta1**step) / root + weight_decay * value)
        for target in (parameter, *main):
            target.copy_(value)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


@contextmanager
def engine_in_fp32() -> Iterator[None]:
    """Take Transformer Engine's linears in fp32, too, so that they can be compared to 1e-5."""
    layers = importlib.import_module("exo_megatron.models.layers")
    original = layers.backend
    vars(layers)["backend"] = lambda spec, dtype: original(spec, torch.bfloat16)
    try:
        yield
    finally:
        vars(layers)["backend"] = original
