"""Gradients of weights, added to megatron-core's fp32 buffers.

megatron-core's DistributedDataParallel gives each parameter `main_grad`, a view of its reduction
buffer, and adds `grad` to it after the parameter's backward, unless `grad_added_to_main_grad` says
that this has been done. Adding there at once saves, per micro-batch and weight, a matrix of the
weight's size, its addition, and the rounding of its sums to half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    layers,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import functional

from exo_megatron.models.numerics import LARGEST_TEMPORARY, add_product_

_TIED = "tied_on_this_stage"


def add_gradients_in_place(model: torch.nn.Module) -> None:
    """Make linears, embeddings and the output layer add their weights' gradients to `main_grad`.

    Only for a model whose parameters have such buffers. megatron-core's own linears get the kernel
    of this module, which they have from apex otherwise; those of Transformer Engine have their own.
    """
    vars(layers)["fused_weight_gradient_mlp_cuda"] = WeightGradients
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            module.gradient_accumulation_fusion = True
        elif "fuse_wgrad_accumulation" in vars(module):  # Transformer Engine's, which read it in every pass
            vars(module)["fuse_wgrad_accumulation"] = True
            # megatron-core then tells it nothing of first micro-batches, whose gradient it would write
            # over the sum: the schedule runs several times in a step with groups in parts.
            vars(module)["disable_parameter_transpose_cache"] = True
    for parameter in model.parameters():
        # megatron-core would add `grad` all the same where a weight is embedding and output layer,
        # because one of the two would not have been added. Here both are.
        if vars(parameter).get("zero_out_wgrad", False):
            vars(parameter)["zero_out_wgrad"] = False
            vars(parameter)[_TIED] = True


def buffer_of(weight: Tensor) -> Tensor | None:
    """Return the buffer of a weight's gradient; None if it has none, or one of half precision."""
    attributes = vars(weight)
    # megatron-core sets the two together.
    buffer: Tensor | None = attributes["main_grad"] if "grad_added_to_main_grad" in attributes else None
    return buffer if buffer is not None and buffer.dtype in (torch.float32, torch.float64) else None


def gradient_for_autograd(weight: Tensor, *, of_output: bool = False) -> Tensor | None:
    """Tell megatron-core that a gradient is in the buffer; return what backward has to return for it.

    of_output: the gradient is the output layer's, which the embedding's follows if they are tied.
    """
    vars(weight)["grad_added_to_main_grad"] = True
    # On CUDA a missing gradient would move megatron-core's hook to another thread, and with
    # overlapped reduction the hook asks for one: it gets a matrix that nobody reads. One, because
    # autograd adds two.
    follows = of_output and _TIED in vars(weight)
    return torch.empty_like(weight) if weight.is_cuda and not follows else None


class WeightGradients:
    """Replacement of apex's `fused_weight_gradient_mlp_cuda`."""

    @staticmethod
    def wgrad_gemm_accum_fp32(rows: Tensor, gradient: Tensor, total: Tensor) -> None:
        """Add gradient^T rows to total [O, I] fp32; rows [N, I], gradient [N, O], any dtype."""
        add_product_(total, gradient.t(), rows)


def look_up(ids: Tensor, weight: Tensor) -> Tensor:
    """Select rows of weight [V, H] by ids [...] int64 -> [..., H]; the gradient goes to the buffer."""
    apply: Callable[..., Tensor] = _LookUp.apply
    return apply(ids, weight)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids, weight)
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None]:
        ids, weight = ctx.saved_tensors
        buffer = buffer_of(weight)
        if buffer is None:
            return None, torch.ops.aten.embedding_dense_backward(grads[0], ids, weight.shape[0], -1, False)
        _add_rows_(buffer, ids.reshape(-1), grads[0].reshape(-1, weight.shape[1]))
        return None, gradient_for_autograd(weight)


def _add_rows_(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add rows [n, H] to total [V, H] at the index [n], which may repeat; always in the same order."""
    # On CUDA equal indices are added one after another. Rows of zeros may go anywhere: those of
    # another rank's tokens all have index 0.
    spread = torch.arange(len(index), device=index.device) % len(total)
    index = torch.where(rows.any(dim=1), index, spread)
    count = max(LARGEST_TEMPORARY // (rows.shape[1] * total.element_size()), 1)
    for chunk, values in zip(index.split(count), rows.split(count), strict=True):
        total.index_put_((chunk,), values.to(total.dtype), accumulate=True)


class WordEmbedding(VocabParallelEmbedding):
    """megatron-core's embedding of tokens, whose gradient goes to the buffer."""

    def forward(self, input_: Tensor) -> Tensor:
        """Embed ids [1, S] -> [1, S, H], or [S / t, 1, H] where it scatters the sequence itself.

        One all-reduce or reduce-scatter over the tensor group.
        """
        if self.tp_group.size() == 1:
            return look_up(input_, self.weight)
        elsewhere = (input_ < self.vocab_start_index) | (input_ >= self.vocab_end_index)
        local = (input_ - self.vocab_start_index).masked_fill_(elsewhere, 0)
        hidden = look_up(local, self.weight).masked_fill(elsewhere[..., None], 0.0)
        reduced: Tensor
        if self.reduce_scatter_embeddings:
            hidden = hidden.transpose(0, 1).contiguous()
            reduced = reduce_scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            reduced = reduce_from_tensor_model_parallel_region(hidden, group=self.tp_group)
        return reduced


class PositionEmbedding(torch.nn.Embedding):
    """torch's embedding of positions, whose gradient goes to the buffer."""

    def forward(self, input: Tensor) -> Tensor:
        """Embed positions [1, S] -> [1, S, H]."""
        return look_up(input, self.weight)


def adapt_embedding(embedding: LanguageModelEmbedding) -> None:
    """Give megatron-core's embeddings the lookups of this module; weights, names and hooks stay."""
    embedding.word_embeddings.__class__ = WordEmbedding
    if embedding.add_position_embedding:
        embedding.position_embeddings.__class__ = PositionEmbedding
