"""Answers for the numbers of tokens of every expert, by which megatron-core sends them: as equal as can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor

from tests.fake_cuda.watch import ANSWERS

Dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher


def answer_splits() -> None:
    """Put numbers in the place of those that the dispatcher copies to the host."""
    vars(token_dispatcher)["maybe_move_tensor_to_cpu"] = _copied
    copy: Callable[..., Any] = Dispatcher._maybe_dtoh_and_synchronize

    def copy_and_answer(self: Any, point: str, tokens_per_expert: Tensor | None = None) -> Any:
        result = copy(self, point, tokens_per_expert)
        return _answer(self) if point == self.cuda_dtoh_point else result

    of_dispatcher: Any = Dispatcher
    of_dispatcher._maybe_dtoh_and_synchronize = copy_and_answer
    vars(token_dispatcher)["permute"] = _selecting(token_dispatcher.permute)


def _selecting(permute: Callable[..., Any]) -> Callable[..., Any]:
    """megatron-core's permutation, whose masks select the tokens that are sent."""

    def selecting(*args: Any, num_out_tokens: int, **kwargs: Any) -> Any:
        ANSWERS.selected = num_out_tokens
        try:
            return permute(*args, num_out_tokens=num_out_tokens, **kwargs)
        finally:
            ANSWERS.selected = None

    return selecting


def _copied(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """megatron-core's copy, without numpy, which cannot read fake tensors."""
    return tensor.to("cpu", non_blocking=True) if isinstance(tensor, Tensor) else tensor


def _answer(dispatcher: Any) -> npt.NDArray[np.int64]:
    """Set the numbers as if every rank had the same ones; returns those of this rank's experts."""
    whole, rest = divmod(dispatcher.num_out_tokens, dispatcher.num_experts)
    sent = np.array([whole + (expert < rest) for expert in range(dispatcher.num_experts)])
    first, here = dispatcher.local_expert_indices[0], dispatcher.num_local_experts
    received = np.broadcast_to(sent[first : first + here], (dispatcher.tp_size, dispatcher.ep_size, here))
    if dispatcher.tp_size * dispatcher.ep_size > 1:
        dispatcher.input_splits = sent.reshape(dispatcher.ep_size, here).sum(1)
        dispatcher.output_splits = received.sum(2)[dispatcher.tp_rank]
        dispatcher.output_splits_tp = received.sum((1, 2))
    if here > 1:
        dispatcher.num_global_tokens_per_local_expert = received.reshape(-1, here)
        chunks = np.arange(dispatcher.num_experts * dispatcher.tp_size)
        dispatcher.sort_input_by_local_experts = chunks.reshape(-1, here).T.ravel()
        dispatcher.restore_output_by_local_experts = chunks.reshape(here, -1).T.ravel()
    return received.sum((0, 1))
