"""Runs megatron-core on CPU with gloo. Does nothing where CUDA is available.

megatron-core writes `torch.cuda.current_device()`, `device="cuda"` and `tensor.type() == "torch.cuda.FloatTensor"`
throughout. `install()` makes those mean the CPU: `torch.cuda` functions that need a driver become their CPU
counterparts or no-ops, and megatron modules that spell out "cuda" get a view of the torch module whose factory
functions put tensors on the CPU. Where megatron-core has a CUDA kernel and a slow way besides, it gets those of
`cpu_kernels`. Nothing outside megatron's own modules and `torch.cuda` changes, except
`Tensor.cuda` (identity) and `Tensor.type()` (its answer equals both the CPU's and the CUDA name).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from exo_megatron.parallel import cpu_kernels
from exo_megatron.parallel.cpu_memory import keep_memory

# Modules of megatron.core (0.16 to 0.19) that create tensors on the literal device "cuda".
_LITERAL_CUDA_MODULES = (
    "optimizer.clip_grads",
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
    """Stands for the CUDA generator. Nothing on CPU draws from it: weights are loaded, dropout is off."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def get_state(self, device: object = None) -> Tensor:
        return self.generator.get_state()

    def set_state(self, state: Tensor, device: object = None, graph_safe: bool = False) -> None:
        self.generator.set_state(state)

    def manual_seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)


class _NoStream:
    """A CUDA stream that has nothing to wait for. A class, because libraries annotate with `torch.cuda.Stream`."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def wait_stream(self, other: object) -> None: ...

    def record_event(self) -> _NoStream:
        """An event, which has nothing to wait for either."""
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
    """The torch module as megatron's modules see it: factory functions read device "cuda" as "cpu"."""

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
    """megatron-core's own leaves CPU tensors as they are, but all-to-all takes split sizes as numbers only."""
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def install() -> None:
    """Make megatron-core usable on CPU in this process. Idempotent; no effect where CUDA is available."""
    if torch.cuda.is_available() or isinstance(torch.cuda.current_device, _Installed):
        return
    _patch_torch_cuda()
    _patch_tensor()
    view = _TorchOnCpu()
    for name in _LITERAL_CUDA_MODULES:
        if importlib.util.find_spec(f"megatron.core.{name}") is not None:
            vars(_megatron(name))["torch"] = view
    _patch_kernels()
    keep_memory()


def _megatron(name: str) -> ModuleType:
    return importlib.import_module(f"megatron.core.{name}")


class _Installed:
    """`torch.cuda.current_device` after `install()`: the CPU."""

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
    for name in ("transformer.mlp", "transformer.moe.shared_experts"):
        vars(_megatron(name))["bias_swiglu_impl"] = cpu_kernels.swiglu
    vars(_megatron("transformer.mlp"))["weighted_bias_swiglu_impl"] = cpu_kernels.weighted_swiglu
    linear = vars(_megatron("tensor_parallel.layers"))
    linear["fused_weight_gradient_mlp_cuda"] = cpu_kernels.WeightGradients
    linear["_grad_accum_fusion_available"] = True
    vars(_megatron("optimizer.clip_grads"))["multi_tensor_scale_impl"] = cpu_kernels.scale
    buffers = vars(_megatron("distributed.param_and_grad_buffer"))
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        buffers[name] = cpu_kernels.unless_alone(buffers[name])


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
