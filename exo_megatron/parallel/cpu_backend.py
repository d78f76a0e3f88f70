"""Changes that make megatron-core run on the CPU with gloo. No effect where CUDA is available.

megatron-core writes `torch.cuda.current_device()`, `device="cuda"` and `tensor.type() ==
"torch.cuda.FloatTensor"` throughout. `install()` makes those mean the CPU: `torch.cuda` functions
that need a driver become their CPU counterparts or no-ops, and megatron modules that spell out
"cuda" get a view of the torch module whose factory functions put tensors on the CPU. Where
megatron-core has both a CUDA kernel and a slow way, it gets the kernels of this module. Nothing
outside megatron-core's own modules and `torch.cuda` changes, except `Tensor.cuda` (identity) and
`Tensor.type()` (its answer equals both the CPU's and the CUDA name).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `torch.nn.functional.rms_norm` over the last dimension, in the dtype of `hidden`.

    hidden [..., H] and weight [H] -> [..., H]. As there, arithmetic is at least fp32. On CUDA torch
    has one kernel for it, on the CPU it makes a dozen passes over memory.
    """
    if not torch.is_grad_enabled():
        return _normed(hidden.reshape(-1, hidden.shape[-1]), weight, eps)[0].view(hidden.shape)
    apply: Callable[..., Tensor] = _RMSNorm.apply
    return apply(hidden, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Autograd function of RMSNorm.

    y = x s w with s = (mean(x^2) + eps)^(-1/2); dx = s g w - s^3/H (sum_h g w x) x; dw is the sum
    of g x s over all vectors.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        normed, scale = _normed(rows, weight, eps)
        ctx.save_for_backward(rows, weight, scale)
        return normed.view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, output: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, scale = ctx.saved_tensors
        x, w, gradient = rows.to(scale.dtype), weight.to(scale.dtype), output.reshape(rows.shape).to(scale.dtype)
        result = gradient * x
        of_weight = torch.mv(result.t(), scale.squeeze(-1)).to(weight.dtype)
        along_x = torch.mv(result, w).unsqueeze(-1).mul_(scale.pow(3)).div_(x.shape[-1])
        torch.mul(gradient, w, out=result).mul_(scale).addcmul_(x, along_x, value=-1)
        return result.to(output.dtype).view(output.shape), of_weight, None


def _normed(vectors: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute y, like vectors [N, H], and s [N, 1] of at least fp32."""
    x = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x, scale).mul_(weight).to(vectors.dtype), scale


def unless_alone(collective: Callable[..., object]) -> Callable[..., object]:
    """Wrap a reduce-scatter or all-gather to do nothing if it would copy a buffer onto itself.

    The shard of a rank that is alone in its group is the whole buffer.
    """

    def run(output: Tensor, input: Tensor, *args: Any, group: torch.distributed.ProcessGroup, **kwargs: Any) -> object:
        if group.size() == 1 and output.data_ptr() == input.data_ptr():
            return None
        return collective(output, input, *args, group=group, **kwargs)

    return run


# glibc's malloc.h. Values are C ints.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT, _KEPT_AT_THE_END = 2**30, 2**31 - 1


def keep_memory() -> None:
    """Make glibc keep freed blocks of up to 1 GiB, because fresh pages are slow to write to.

    No effect with another C library, and unless the environment has THP_MEM_ALLOC_ENABLE=1.
    """
    if os.environ.get("THP_MEM_ALLOC_ENABLE") != "1":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_AT_THE_END)


# Modules of megatron.core (0.16 to 0.19) that create tensors on the literal device "cuda".
_LITERAL_CUDA_MODULES = (
    "optimizer.grad_scaler",
    "optimizer.optimizer",
    "pipeline_parallel.schedules",
    "distributed.param_and_grad_buffer",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
    "utils",
)
_FACTORIES = ("empty", "empty_like", "full", "ones", "rand", "tensor", "zeros", "zeros_like")


class _CudaRng:
    """Replacement of the CUDA generator.

    Nothing on the CPU draws from it: weights are loaded, dropout is off.
    """

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def get_state(self, device: object = None) -> Tensor:
        return self.generator.get_state()

    def set_state(self, state: Tensor, device: object = None, graph_safe: bool = False) -> None:
        self.generator.set_state(state)

    def manual_seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)


class _NoStream:
    """A CUDA stream that has nothing to wait for.

    It is a class, because libraries annotate with `torch.cuda.Stream`.
    """

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def wait_stream(self, other: object) -> None: ...

    def record_event(self) -> _NoStream:
        """Return an event, which has nothing to wait for either."""
        return self

    def synchronize(self) -> None: ...


class _TypeName(str):
    """A tensor type name that equals its CPU and its CUDA spelling."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and other.replace("torch.cuda.", "torch.") == str(self)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class _TorchOnCpu(ModuleType):
    """The torch module for megatron-core's modules: factories read device "cuda" as "cpu"."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def create(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return factory(*args, device="cpu" if str(device).startswith("cuda") else device, **kwargs)

    return create


def _returns(value: object) -> Callable[..., object]:
    def function(*args: object, **kwargs: object) -> object:
        return value

    return function


def _as_moved_to_cpu(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
    """Return the tensor, as numpy if asked. Replaces megatron-core's `maybe_move_tensor_to_cpu`.

    That leaves CPU tensors as they are, but all-to-all accepts split sizes as numbers only.
    """
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def install() -> None:
    """Make megatron-core usable on CPU in this process.

    Idempotent; no effect where CUDA is available.
    """
    if torch.cuda.is_available() or isinstance(torch.cuda.current_device, _Installed):
        return
    _import_uncompiled()
    _patch_torch_cuda()
    _patch_tensor()
    view = _TorchOnCpu()
    for name in _LITERAL_CUDA_MODULES:
        if importlib.util.find_spec(f"megatron.core.{name}") is not None:
            vars(_megatron(name))["torch"] = view
    _patch_kernels()
    keep_memory()


def _import_uncompiled() -> None:
    """Import megatron-core, its functions as they are written.

    It decorates some with `torch.compile`. That imports a compiler, which takes half of the time
    until a process can start, for functions that hardly any model of ours calls.
    """
    compile_, vars(torch)["compile"] = torch.compile, _as_written
    try:
        importlib.import_module("megatron.core")
    finally:
        vars(torch)["compile"] = compile_


def _as_written(function: Callable[..., object] | None = None, **kwargs: object) -> Callable[..., object]:
    return _as_written if function is None else function


def _megatron(name: str) -> ModuleType:
    return importlib.import_module(f"megatron.core.{name}")


class _Installed:
    """Replacement of `torch.cuda.current_device`: the CPU. Marks that `install()` has run."""

    def __call__(self) -> torch.device:
        return torch.device("cpu")


def _patch_torch_cuda() -> None:
    rng = _CudaRng()
    stream = _NoStream()
    replacements: dict[str, object] = {
        "current_device": _Installed(),
        "set_device": _returns(None),
        "device_count": _returns(1),
        "synchronize": _returns(None),
        "empty_cache": _returns(None),
        "current_stream": _returns(stream),
        "default_stream": _returns(stream),
        "Stream": _NoStream,
        "stream": lambda stream: contextlib.nullcontext(),
        "get_rng_state": rng.get_state,
        "set_rng_state": rng.set_state,
        "manual_seed": rng.manual_seed,
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    vars(torch.cuda.random)["get_rng_state"] = rng.get_state
    for name in ("range_push", "range_pop"):
        setattr(torch.cuda.nvtx, name, _returns(None))
    vars(_megatron("tensor_parallel.random"))["_set_cuda_rng_state"] = rng.set_state
    vars(_megatron("transformer.moe.token_dispatcher"))["maybe_move_tensor_to_cpu"] = _as_moved_to_cpu


def _patch_kernels() -> None:
    buffers = vars(_megatron("distributed.param_and_grad_buffer"))
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        buffers[name] = unless_alone(buffers[name])


def _patch_tensor() -> None:
    original_type = torch.Tensor.type

    def tensor_type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        return _TypeName(answer) if isinstance(answer, str) else answer

    def tensor_cuda(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self

    vars_of_tensor: Any = torch.Tensor
    vars_of_tensor.type = tensor_type
    vars_of_tensor.cuda = tensor_cuda
