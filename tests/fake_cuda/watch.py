"""Watches the operators of fake CUDA tensors, and answers the host where it reads a number that is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fake_cuda.device import DEFAULT, STREAMS, Stream
from tests.fake_cuda.trace import RECORD, place
from tests.fake_cuda.views import VIEWS

# Operators whose result's shape the host must wait for.
SHAPES = frozenset({"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"})
UPLOADED: list[tuple[Stream, Tensor]] = []
"""Copies on other streams since the last operator on the default one."""


ANSWER = 1
"""What the host reads on the device, converted to its type."""


class Watch(TorchDispatchMode):
    """Notes every operator of CUDA tensors in RECORD; enter it inside a FakeTensorMode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        if name == "_local_scalar_dense" and not _known(args[0]):
            if args[0].is_cuda:
                RECORD.wait("item")
            return _number(args[0].dtype)
        if (
            name in SHAPES
            and kwargs.get("output_size") is None
            and any(isinstance(arg, Tensor) and arg.is_cuda for arg in args)
        ):
            RECORD.wait(name)
        if name == "_to_copy" and torch.device(kwargs.get("device") or "cpu").type == "cuda" and not args[0].is_cuda:
            # Not func, which would really copy a fake tensor that knows its value.
            out = torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=torch.device("cuda", 0))
        else:
            out = func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            vars(out)["pinned"] = True
        if name == "_to_copy":  # not blocking, it makes a pinned copy, which something must wait for later
            _note_copy(args[0], out, waits=not kwargs.get("non_blocking"))
        elif name == "copy_":
            _note_copy(args[1], args[0], waits=True)
        elif name not in VIEWS and any(each.is_cuda for each in _tensors(out)):
            _note_use()
        if name not in VIEWS and any(each.is_cuda for each in _tensors(out)):
            RECORD.operators[name] += 1
            _note_made(func, out)
        return out


def watch_reads() -> None:
    """Patch the two ways of reading many numbers of which a dispatch mode sees none, or every single one."""
    of_tensor: Any = FakeTensor
    of_tensor.tolist = _tolist
    of_torch: Any = torch
    of_torch.tensor = _tensor_of(torch.tensor)


def _known(tensor: Tensor) -> bool:
    return not tensor.is_cuda and not (isinstance(tensor, FakeTensor) and tensor.constant is None)


def _number(dtype: torch.dtype) -> bool | int | float:
    kind = bool if dtype == torch.bool else float if dtype.is_floating_point else int
    return kind(ANSWER)


def _note_copy(source: object, target: Tensor, *, waits: bool) -> None:
    if isinstance(source, Tensor) and source.is_cuda != target.is_cuda and source.numel():
        if target.is_cuda:
            ahead = vars(source).get("pinned", False) and not waits and STREAMS[-1] is not DEFAULT
            RECORD.upload(ahead=ahead)
            if ahead:
                STREAMS[-1].copied = True
                UPLOADED.append((STREAMS[-1], target))
        elif waits:
            RECORD.wait("copy to host")


def _note_use() -> None:
    """Find what was copied on other streams and is not ready for the present one, or may be taken from it."""
    while UPLOADED and STREAMS[-1] is DEFAULT:
        stream, tensor = UPLOADED.pop()
        if stream.copied:
            RECORD.unsafe[f"{RECORD.phase}: does not wait for a copy, before {place()}"] += 1
        if not vars(tensor).get("shared", False):
            RECORD.unsafe[f"{RECORD.phase}: a copy whose memory its stream may use again, before {place()}"] += 1


def _note_made(func: Any, out: object) -> None:
    """Note new tensors, which are not those that the operator was given."""
    for each, returned in zip(_tensors(out), func._schema.returns, strict=False):
        if returned.alias_info is None:
            RECORD.made(each)


def _tensors(out: object) -> list[Tensor]:
    each = out if isinstance(out, (tuple, list)) else [out]
    return [value for value in each if isinstance(value, Tensor)]


def _tolist(self: FakeTensor) -> Any:
    if self.is_cuda:
        RECORD.wait("tolist")
    elif self.constant is not None:
        return self.constant.tolist()
    return _nested(self.shape, _number(self.dtype))


def _nested(shape: torch.Size, number: bool | int | float) -> Any:
    return [_nested(shape[1:], number) for _ in range(shape[0])] if shape else number


def _tensor_of(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor, which reads every CUDA scalar of a list."""

    def tensor(data: object, *args: Any, **kwargs: Any) -> Tensor:
        return original(plain(data), *args, **kwargs)

    def plain(data: object) -> object:
        if isinstance(data, (list, tuple)):
            return [plain(each) for each in data]
        if isinstance(data, Tensor) and data.is_cuda:
            RECORD.wait("torch.tensor")
            return _number(data.dtype)
        return data

    return tensor
