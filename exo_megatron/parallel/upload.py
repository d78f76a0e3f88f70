"""Copies of host tensors to the device, many in one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def to_device(value: T, device: torch.device) -> T:
    """Replace all CPU tensors in a value by copies on the device, without waiting for it.

    They go through one pinned buffer and one copy on a stream of its own, for which the current
    stream waits. On the CPU the value is returned as it is. Tensors that are equal as objects stay
    so.

    Args:
        value: a tensor, or a dataclass, list or tuple of such; other objects stay as they are.
        device: the current device, or the CPU.
    """
    if device.type == "cpu":
        return value
    found: dict[int, Tensor] = {}
    _visit(value, lambda tensor: found.setdefault(id(tensor), tensor) if tensor.device.type == "cpu" else tensor, {})
    copies = dict(zip(found, _copy(list(found.values()), device), strict=True)) if found else {}
    result: T = _visit(value, lambda tensor: copies.get(id(tensor), tensor), {})
    return result


def _visit(value: Any, change: Callable[[Tensor], Tensor], done: dict[int, Any]) -> Any:
    """Rebuild a value from changed tensors; parts without any remain the same objects."""
    if id(value) not in done:
        done[id(value)] = _rebuilt(value, lambda part: _visit(part, change, done), change)
    return done[id(value)]


def _rebuilt(value: Any, visit: Callable[[Any], Any], change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        parts = [visit(part) for part in value]
        return value if all(map(_same, parts, value)) else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        names = {field.name: vars(value)[field.name] for field in fields(value) if field.init}
        changed = {name: visit(part) for name, part in names.items()}
        return value if all(map(_same, changed.values(), names.values())) else replace(value, **changed)
    return value


def _same(left: object, right: object) -> bool:
    return left is right


def _copy(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors together and return the copies, views of one buffer on the device."""
    # Wider elements first: then each begins at a multiple of its size.
    order = sorted(range(len(tensors)), key=lambda place: -tensors[place].element_size())
    pieces = [tensors[place].contiguous().view(-1).view(torch.uint8) for place in order]
    sizes = [piece.numel() for piece in pieces]
    pinned = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    torch.cat(pieces, out=pinned)
    present, ahead = torch.cuda.current_stream(device), _copy_stream(device)
    with torch.cuda.stream(ahead):
        buffer = pinned.to(device, non_blocking=True)
    present.wait_stream(ahead)
    buffer.record_stream(present)  # allocated on the other stream, which may not reuse it before this one is done
    copies = {
        place: piece.view(tensors[place].dtype).view(tensors[place].shape)
        for place, piece in zip(order, buffer.split(sizes), strict=True)
    }
    return [copies[place] for place in range(len(tensors))]


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of copies; one for a device, because memory is kept by the stream it was allocated on."""
    return torch.cuda.Stream(device)
