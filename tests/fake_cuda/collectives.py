"""A world of ranks of which only this one exists: every call of torch.distributed is noted and moves nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.fake_cuda.trace import RECORD

# How many of the first arguments are tensors or lists of them.
TENSORS = {
    "all_reduce": 1,
    "broadcast": 1,
    "reduce": 1,
    "send": 1,
    "recv": 1,
    "isend": 1,
    "irecv": 1,
    "all_gather": 2,
    "all_gather_into_tensor": 2,
    "_all_gather_base": 2,
    "reduce_scatter": 2,
    "reduce_scatter_tensor": 2,
    "_reduce_scatter_base": 2,
    "gather": 2,
    "scatter": 2,
    "all_to_all": 2,
    "all_to_all_single": 2,
}


class Work:
    """A collective that is done."""

    def wait(self, *args: object) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def join(world_size: int, rank: int) -> None:
    """Be `rank` of a world of `world_size`."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def install() -> None:
    """To be called before megatron-core is imported, which keeps some collectives under names of its own."""
    new_group = dist.new_group

    def fake_group(ranks: Sequence[int] | None = None, *args: object, **kwargs: object) -> Any:
        return new_group(ranks, backend="fake")

    replacements: dict[str, object] = {name: _noted(name, tensors) for name, tensors in TENSORS.items()}
    replacements |= {
        "new_group": fake_group,
        "batch_isend_irecv": _batch,
        "_coalescing_manager": _coalescing,
        "barrier": lambda *args, **kwargs: None,
        "all_gather_object": _all_gather_object,
        "broadcast_object_list": lambda *args, **kwargs: None,
    }
    vars(dist).update(replacements)
    vars(dist.distributed_c10d).update(replacements)


def _noted(name: str, tensors: int) -> Callable[..., Work | None]:
    def collective(*args: Any, async_op: bool = False, **kwargs: Any) -> Work | None:
        for arg in (*args[:tensors], *kwargs.values()):
            for tensor in arg if isinstance(arg, (list, tuple)) else [arg]:
                if isinstance(tensor, Tensor):
                    RECORD.collective(name, tensor)
        return Work() if async_op or name in ("isend", "irecv") else None

    collective.__name__ = name
    return collective


def _batch(operations: Sequence[dist.P2POp]) -> list[Work]:
    for each in operations:
        RECORD.collective(each.op.__name__, each.tensor)
    return [Work() for _ in operations]


@contextlib.contextmanager
def _coalescing(*args: object, **kwargs: object) -> Iterator[Work]:
    yield Work()


def _all_gather_object(out: list[object], value: object, group: object = None) -> None:
    out[:] = [value] * len(out)
