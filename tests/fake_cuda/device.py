"""Makes `torch.cuda` of the CPU build speak of one device. To be called before megatron-core is imported."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor

from tests.fake_cuda.trace import RECORD

DEVICE = torch.device("cuda", 0)
# Operators of which a build without CUDA has a composite only; one with CUDA has a kernel, and so do autograd's modes.
FUSED = ("_fused_rms_norm",)
MEMORY = 80 * 2**30
LIBRARY = torch.library.Library("aten", "IMPL")


class Stream:
    """A stream on which nothing runs. copied: whether it has copied what nobody has waited for yet."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.device = DEVICE
        self.cuda_stream = 0
        self.copied = False

    def wait_stream(self, other: Stream) -> None:
        other.copied = False

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: object = None) -> Event:
        return Event()

    def synchronize(self) -> None:
        RECORD.wait("Stream.synchronize")


DEFAULT = Stream()
STREAMS = [DEFAULT]
"""The streams of the blocks that the program is in; work goes to the last."""


@contextlib.contextmanager
def _on_stream(stream: Stream | None) -> Iterator[None]:
    STREAMS.append(stream or STREAMS[-1])
    try:
        yield
    finally:
        STREAMS.pop()


class Event:
    """An event that has happened."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def record(self, *args: object) -> None: ...

    def wait(self, *args: object) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        RECORD.wait("Event.synchronize")


def install() -> None:
    """Needs the libraries of this folder: one preloaded, the other on the path."""
    importlib.import_module("exo_fake_cuda_device")
    for name in FUSED:
        LIBRARY.impl(name, _no_data, "CUDA")
    vars(torch)["compile"] = _not_compiled
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made on the CPU and moved
    vars(fake_tensor)["init_gpu_context"] = lambda device: None
    generator = torch.Generator()
    properties = SimpleNamespace(name="fake H100", total_memory=MEMORY, major=9, minor=0, multi_processor_count=132)
    replacements: dict[str, object] = {
        "is_available": _returns(True),
        "is_initialized": _returns(False),
        "_lazy_init": _returns(None),
        "device_count": _returns(1),
        "current_device": _returns(DEVICE),
        "set_device": _returns(None),
        "device": lambda device: contextlib.nullcontext(),
        "get_device_properties": _returns(properties),
        "get_device_capability": _returns((9, 0)),
        "get_device_name": _returns(properties.name),
        "mem_get_info": _returns((MEMORY, MEMORY)),
        "memory_allocated": _returns(0),
        "empty_cache": _returns(None),
        "synchronize": lambda device=None: RECORD.wait("torch.cuda.synchronize"),
        "current_stream": lambda device=None: STREAMS[-1],
        "default_stream": _returns(DEFAULT),
        "stream": _on_stream,
        "Stream": Stream,
        "Event": Event,
        "manual_seed": _returns(None),
        "get_rng_state": lambda device=None: generator.get_state(),
        "set_rng_state": lambda state, device=None: None,
        "is_bf16_supported": _returns(True),
        "is_current_stream_capturing": _returns(False),
        "default_generators": (generator,),
    }
    vars(torch.cuda).update(replacements)
    for name in ("get_rng_state", "set_rng_state"):
        vars(torch.cuda.random)[name] = replacements[name]
    vars(torch.cuda.nvtx).update(range_push=_returns(None), range_pop=_returns(None))
    of_module: Any = nn.Module
    of_module.to = _module_to
    of_tensor: Any = Tensor
    of_tensor.record_stream = lambda self, stream: vars(self).update(shared=True)


def _no_data(*args: object) -> NoReturn:
    raise NotImplementedError("tensors of the fake device have no data")


def _not_compiled(function: Callable[..., Any] | None = None, **kwargs: object) -> Callable[..., Any]:
    """`torch.compile`, which megatron-core decorates functions with: it imports a compiler, and the device has none."""
    return function if function is not None else _not_compiled


def _returns(value: object) -> Callable[..., object]:
    def function(*args: object, **kwargs: object) -> object:
        return value

    return function


def _module_to(self: nn.Module, device: torch.device | None = None, *, dtype: torch.dtype | None = None) -> nn.Module:
    """`Module.to`, which for fake tensors would swap parameters that others refer to."""
    for module in self.modules():
        for name, old in module._parameters.items():
            if old is not None and (old.device.type, old.dtype) != ((device or old.device).type, dtype or old.dtype):
                data: Tensor = torch.empty(old.shape, dtype=dtype or old.dtype, device=device or old.device)
                new = nn.Parameter(data, requires_grad=old.requires_grad)
                vars(new).update({key: value for key, value in vars(old).items() if key not in vars(new)})
                module._parameters[name] = new
    return self
