"""Gradient of the vocabulary matrix, added to megatron-core's fp32 buffer where there is one.

See exo_megatron/models/main_grad.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exo_megatron.models.main_grad import buffer_of, gradient_for_autograd
from exo_megatron.models.numerics import add_product_


class WeightGradient:
    """The gradient of a weight [Vp/t, H], by ranges of ids: in its buffer, or in a new matrix."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Choose the buffer if it has the accumulation dtype `dtype`, else a new matrix.

        A buffer of another dtype is left to autograd and megatron-core.
        """
        self._weight = weight
        buffer = buffer_of(weight)
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
        return gradient_for_autograd(self._weight, of_output=True)
