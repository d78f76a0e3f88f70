"""Answers for the shapes of hidden states, which megatron-core's schedule receives from the neighbouring stages."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from exo_megatron.training import oversized, step


def answer_shapes(multiple: int, hidden_size: int) -> None:
    """Give the shapes of the micro-batches of every schedule that the project starts, in their order.

    Forward and backward come in the same order in 1F1B.
    """
    forward: deque[list[int]] = deque()
    backward: deque[list[int]] = deque()
    communicate: Callable[..., Any] = P2PCommunicator._communicate_shapes

    def communicate_shapes(self: Any, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool) -> Any:
        previous, next_ = communicate(self, send_next, send_prev, recv_prev, recv_next)
        return forward.popleft() if recv_prev else previous, backward.popleft() if recv_next else next_

    def in_order(get_schedule: Callable[[], Callable[..., Any]]) -> Callable[[], Callable[..., Any]]:
        def schedule(*, data_iterator: Any, **kwargs: Any) -> Any:
            items = list(data_iterator)
            shapes = [[_layout(item).num_tokens // multiple, 1, hidden_size] for item in items]
            forward.extend(shapes)
            backward.extend(shapes)
            result = get_schedule()(data_iterator=iter(items), **kwargs)
            forward.clear()
            backward.clear()
            return result

        return lambda: schedule

    of_communicator: Any = P2PCommunicator
    of_communicator._communicate_shapes = communicate_shapes
    for module in (step, oversized):
        vars(module)["get_forward_backward_func"] = in_order(module.get_forward_backward_func)


def _layout(item: Any) -> Any:
    """Of a micro-batch, which comes with a number, or of a part of an oversized group."""
    return (item[0] if isinstance(item, tuple) else item).layout
