"""Copies of many tensors in one (on a device: tests/fake_cuda)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from exo_megatron.parallel import upload
from exo_megatron.parallel.upload import to_device

ELSEWHERE = torch.device("cuda", 0)


@dataclass(frozen=True)
class Inner:
    index: Tensor
    name: str


@dataclass(frozen=True)
class Outer:
    inner: Inner
    again: Tensor
    several: list[Tensor | None]
    kept: Any
    sizes: tuple[int, ...]


def value() -> Outer:
    index = torch.arange(5)
    mask = torch.tensor([[True, False, True]]).t()  # not contiguous, and of one byte
    empty = torch.zeros(0, dtype=torch.int32)
    return Outer(Inner(index, "x"), index, [mask, None, torch.tensor(1.5).double(), empty], {"a": index}, (3, 4))


def test_nothing_happens_on_the_cpu() -> None:
    given = value()
    assert to_device(given, torch.device("cpu")) is given


def test_copies_of_all_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the buffer, which is here on the CPU; its pieces begin where their type may."""
    buffers: list[Tensor] = []
    empty = torch.empty

    def unpinned(*args: Any, pin_memory: bool, **kwargs: Any) -> Tensor:
        assert pin_memory
        buffers.append(empty(*args, **kwargs))
        return buffers[-1]

    original = upload._copy
    monkeypatch.setattr(upload, "_copy", lambda tensors, device: original(tensors, torch.device("cpu")))
    monkeypatch.setattr(upload, "_copy_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    given = value()
    found = to_device(given, ELSEWHERE)
    (buffer,) = buffers
    assert buffer.nbytes == 5 * 8 + 8 + 3
    assert found.inner.index is found.again and found.inner.index is not given.again
    assert found.again.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert torch.equal(found.again, given.again) and found.inner.name == "x"
    assert found.several[1] is None and found.kept is given.kept and found.sizes is given.sizes
    for place in (0, 2, 3):
        copy, original_ = found.several[place], given.several[place]
        assert copy is not None and original_ is not None
        assert copy.dtype == original_.dtype and copy.shape == original_.shape and torch.equal(copy, original_)


def test_what_has_no_tensors_remains_the_same() -> None:
    given = [Inner, (1, "a"), None]
    assert to_device(given, ELSEWHERE) is given
