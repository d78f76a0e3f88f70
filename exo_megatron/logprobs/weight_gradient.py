"""Where the gradient of the vocabulary matrix goes: megatron-core's fp32 buffer where there is one.

megatron-core's DistributedDataParallel gives each parameter `main_grad`, a view of its reduction buffer, and after a
parameter's backward adds `grad` to it, unless `grad_added_to_main_grad` says that this has happened: what its own
linear layers do with gradient_accumulation_fusion. Doing the same here saves a matrix of the vocabulary's size, its
cast and its addition per micro-batch, and the rounding of half-precision gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exo_megatron.models.products import add_product_


class WeightGradient:
    """The gradient of a weight [Vp/t, H], row range by row range: into its buffer, or into a new matrix."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """dtype: what the gradient accumulates in; a buffer of another type is left to autograd and megatron-core."""
        self._weight = weight
        attributes = vars(weight)
        # megatron-core sets the two together.
        buffer: Tensor | None = attributes["main_grad"] if "grad_added_to_main_grad" in attributes else None
        self._in_place = buffer is not None and buffer.dtype == dtype
        self._matrix = buffer if buffer is not None and self._in_place else weight.new_empty(weight.shape, dtype=dtype)

    def add(self, rows: slice, left: Tensor, right: Tensor, *, first: bool) -> None:
        """Add left @ right [rows, H]. first: nothing has been added to these rows, which without a buffer it sets."""
        add_product_(self._matrix[rows], left, right, fresh=first and not self._in_place)

    def no_rows_from(self, row: int) -> None:
        """Rows from `row` on have no gradient."""
        if not self._in_place:
            self._matrix[row:].zero_()

    def add_rows(self, rows: Tensor, values: Tensor) -> None:
        """Add values [n, H] to these rows, which may repeat; after the ranges."""
        self._matrix.index_put_((rows,), values, accumulate=True)

    def for_autograd(self) -> Tensor | None:
        """What backward returns for the weight."""
        if not self._in_place:
            return self._matrix.to(self._weight.dtype)
        # Tied to embeddings of the same stage (megatron-core marks that by zero_out_wgrad): their gradient arrives
        # in `grad` and must still be added.
        if vars(self._weight).get("zero_out_wgrad", False):
            return None
        vars(self._weight)["grad_added_to_main_grad"] = True
        # On CUDA a missing gradient would move megatron-core's hook to another thread, and with overlapped reduction
        # the hook asks for one: it gets a matrix that nobody reads.
        return torch.empty_like(self._weight) if self._weight.is_cuda else None
