"""Gradient of the vocabulary matrix, added to megatron-core's fp32 buffer where there is one.

megatron-core's DistributedDataParallel gives each parameter `main_grad`, a view of its reduction
buffer, and adds `grad` to it after the parameter's backward, unless `grad_added_to_main_grad` says
that this has been done, as its own linear layers do with gradient_accumulation_fusion. Doing the
same here saves, per micro-batch, a matrix of the vocabulary's size, its cast and its addition, and
the rounding of half-precision gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exo_megatron.models.numerics import add_product_


class WeightGradient:
    """The gradient of a weight [Vp/t, H], by ranges of ids: in its buffer, or in a new matrix."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Choose the buffer if it has the accumulation dtype `dtype`, else a new matrix.

        A buffer of another dtype is left to autograd and megatron-core.
        """
        self._weight = weight
        attributes = vars(weight)
        # megatron-core sets the two together.
        buffer: Tensor | None = attributes["main_grad"] if "grad_added_to_main_grad" in attributes else None
        self._in_place = buffer is not None and buffer.dtype == dtype
        self._matrix = buffer if buffer is not None and self._in_place else weight.new_empty(weight.shape, dtype=dtype)

    def add(self, ids: slice, left: Tensor, right: Tensor, *, first: bool) -> None:
        """Add left @ right to the gradient of some ids of the vocabulary.

        Args:
            ids: a range of ids, counted from the first of this shard, n of them.
            left: [n, k].
            right: [k, H].
            first: nothing has been added to these ids yet; without a buffer they are overwritten.
        """
        add_product_(self._matrix[ids], left, right, fresh=first and not self._in_place)

    def clear_from(self, start: int) -> None:
        """Set the gradient of the ids from `start` on to 0, unless it is in a buffer."""
        if not self._in_place:
            self._matrix[start:].zero_()

    def add_at(self, ids: Tensor, values: Tensor) -> None:
        """Add values [n, H] at these ids, which may repeat. Call it after `add`."""
        self._matrix.index_put_((ids,), values, accumulate=True)

    def for_autograd(self) -> Tensor | None:
        """Return the gradient that autograd's backward has to return for the weight."""
        if not self._in_place:
            return self._matrix.to(self._weight.dtype)
        # Tied to embeddings of the same pipeline stage (megatron-core marks that by
        # zero_out_wgrad): their gradient arrives in `grad` and must still be added.
        if vars(self._weight).get("zero_out_wgrad", False):
            return None
        vars(self._weight)["grad_added_to_main_grad"] = True
        # On CUDA a missing gradient would move megatron-core's hook to another thread, and with
        # overlapped reduction the hook asks for one: it gets a matrix that nobody reads.
        return torch.empty_like(self._weight) if self._weight.is_cuda else None
