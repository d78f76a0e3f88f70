"""Attention in passes over variable-length blocks, on each device's kernels, with its backward.

Several passes of one query, over different keys, are merged by their log-sum-exps (LSE), as in
flash attention's split over keys and in ring attention. For the backward, flash attention needs
only the *merged* output and LSE, so each pass's own kernel is called with them: with P = exp(scores
- LSE_merged) and delta = rowsum(dO * O_merged), its gradients are exactly that pass's share of the
whole.

On CUDA in half precision, a pass is one variable-length flash-attention launch, whatever the number
of blocks. Elsewhere it is one call of the CPU flash kernels for each run of blocks of equal shape.
Where flash attention does not support what is asked (fp32 on CUDA, a soft cap, on the CPU a window
shorter than the texts), plain matrix products are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from exo_megatron.models.attention.dense import Blocks, CpuFlashKernel, DenseKernel, PlainKernel
from exo_megatron.models.attention.passes import QKV, Attended, AttentionPass, ScoreRule, StoredKeyValue


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    passes: Sequence[AttentionPass],
    rule: ScoreRule,
    stored: StoredKeyValue | None = None,
) -> Tensor:
    """Attend in several passes that are merged. Local to the rank; differentiable.

    Args:
        query: [S, hq, d].
        key, value: [S, hkv, d].
        passes: in the first one every query is in a block, in order. The others are merged into it.
        rule: how scores are computed.
        stored: read instead of key and value by the passes after the first. The backward adds the
            gradients to it.

    Returns:
        [S, hq, d].
    """
    apply: Callable[..., Tensor] = _Attention.apply
    return apply(query, key, value, tuple(passes), rule, stored)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        passes: tuple[AttentionPass, ...],
        rule: ScoreRule,
        stored: StoredKeyValue | None,
    ) -> Tensor:
        first, *others = passes
        inputs = QKV(query, key, value)
        seen = inputs if stored is None else QKV(query, stored.key.value, stored.value.value)
        attended = kernels_for(query, first, rule).forward(inputs, first, rule)
        for each in others:
            kernels_for(query, each, rule).merge(attended, seen, each, rule)
        ctx.save_for_backward(*inputs, *attended)
        ctx.passes, ctx.rule, ctx.stored = passes, rule, stored
        return attended.output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, *saved = ctx.saved_tensors
        first, *others = ctx.passes
        inputs, attended = QKV(query, key, value), Attended(*saved)
        totals = kernels_for(query, first, ctx.rule).gradients(None, grads[0], inputs, attended, first, ctx.rule)
        seen, sums = inputs, totals
        if ctx.stored is not None:
            seen = QKV(query, ctx.stored.key.value, ctx.stored.value.value)
            sums = QKV(totals.query, ctx.stored.key.gradient, ctx.stored.value.gradient)
        for each in others:
            kernels_for(query, each, ctx.rule).gradients(sums, grads[0], seen, attended, each, ctx.rule)
        return *totals, None, None, None


class AttentionKernels(Protocol):
    """Kernels of a pass and of its backward, which uses whatever output and LSE it is given.

    These are those of the pass alone, or merged with those of other passes over other keys.
    """

    def forward(self, inputs: QKV, pass_: AttentionPass, rule: ScoreRule) -> Attended:
        """Compute output and LSE of a pass whose blocks are all tokens of the query."""
        ...

    def merge(self, merged: Attended, inputs: QKV, pass_: AttentionPass, rule: ScoreRule) -> None:
        """Merge a pass into `merged`, the result of passes over other keys, in place."""
        ...

    def gradients(
        self, totals: QKV | None, grad: Tensor, inputs: QKV, merged: Attended, pass_: AttentionPass, rule: ScoreRule
    ) -> QKV:
        """Compute the gradients of query, key and value, and add them to `totals`.

        Args:
            totals: sums to add to; None: new tensors, for a pass whose blocks are all tokens.
            grad: gradient of the output.
            inputs: query, key and value.
            merged: output and LSE of all passes merged.
            pass_: the pass.
            rule: how scores are computed.
        """
        ...


def kernels_for(query: Tensor, pass_: AttentionPass, rule: ScoreRule) -> AttentionKernels:
    """Choose the kernels for this device and dtype that support the rule in this pass."""
    windowed = _is_windowed(pass_, rule)
    if may_use_flash_varlen(query.device, query.dtype, softcap=rule.softcap) and (pass_.causal or not windowed):
        return FlashVarlenKernels()
    if query.device.type == "cuda" or rule.softcap is not None or windowed:
        return BatchedKernels(PlainKernel())
    return BatchedKernels(CpuFlashKernel())


def takes_window(query: Tensor, rule: ScoreRule) -> bool:
    """Tell whether a causal pass with a window that cuts its texts takes the CUDA operator."""
    return rule.window is not None and may_use_flash_varlen(query.device, query.dtype, softcap=rule.softcap)


def _is_windowed(pass_: AttentionPass, rule: ScoreRule) -> bool:
    return rule.window is not None and pass_.longest > rule.window


def may_use_flash_varlen(device: torch.device, dtype: torch.dtype, *, softcap: float | None) -> bool:
    """Tell whether passes take the CUDA operator, causal ones with any window.

    It has no fp32: there, matrix products are used. A window counts from the end of a block, where
    its last key must be that of its last query, as in causal passes only.
    """
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and softcap is None


def merge_(merged: Attended, other: Attended) -> None:
    """Merge attention over other keys into `merged`, in place.

    Here output [..., d] and LSE [...] may have any shape.
    """
    (output, lse), (other_output, other_lse) = merged, other
    share = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    if output.dtype == share.dtype:
        output.lerp_(other_output, share)
    elif output.is_cuda:  # whose operators widen half precision as they read it, without copies
        change = torch.mul(other_output, share).addcmul_(output, share, value=-1)
        torch.add(output, change, out=output)
    else:
        output.copy_(torch.lerp(output.to(share.dtype), other_output.to(share.dtype), share))
    torch.logaddexp(lse, other_lse, out=lse)


FLASH_LARGEST_HEAD = 256
FLASH_HEAD_MULTIPLE = 8


class FlashVarlenKernels:
    """ATen's variable-length flash attention, delimited by cumulative lengths on the device.

    Tokens are gathered first unless the pass uses all of a tensor. See AttentionKernels.
    """

    def forward(self, inputs: QKV, pass_: AttentionPass, rule: ScoreRule) -> Attended:
        """See AttentionKernels."""
        output, lse, _, _, _ = torch.ops.aten._flash_attention_forward(
            _taken(inputs.query, pass_.query_index),
            _taken(inputs.key, pass_.key_index),
            _taken(inputs.value, pass_.key_index),
            pass_.query_bounds,
            pass_.key_bounds,
            max(pass_.query_lengths),
            max(pass_.key_lengths),
            0.0,
            pass_.causal,
            False,
            scale=rule.scale,
            **_window(pass_, rule),
        )
        return Attended(output, lse)

    def merge(self, merged: Attended, inputs: QKV, pass_: AttentionPass, rule: ScoreRule) -> None:
        """See AttentionKernels."""
        part, part_lse = self.forward(inputs, pass_, rule)
        index = slice(None) if pass_.query_index is None else pass_.query_index
        output, lse = merged.output[index], merged.lse[:, index]
        merge_(Attended(output, lse.t()), Attended(part, part_lse.t()))
        merged.output[index], merged.lse[:, index] = output, lse

    def gradients(
        self, totals: QKV | None, grad: Tensor, inputs: QKV, merged: Attended, pass_: AttentionPass, rule: ScoreRule
    ) -> QKV:
        """See AttentionKernels."""
        # The random state is read only when dropout is on.
        no_rng = torch.empty(2, dtype=torch.uint64, device=grad.device)
        unused = torch.empty(0, dtype=torch.uint64, device=grad.device)
        queries, keys = pass_.query_index, pass_.key_index
        gradients = torch.ops.aten._flash_attention_backward(
            _taken(grad, queries).contiguous(),
            _taken(inputs.query, queries),
            _taken(inputs.key, keys),
            _taken(inputs.value, keys),
            _taken(merged.output, queries),
            merged.lse.contiguous() if queries is None else merged.lse[:, queries],
            pass_.query_bounds,
            pass_.key_bounds,
            max(pass_.query_lengths),
            max(pass_.key_lengths),
            0.0,
            pass_.causal,
            no_rng,
            unused,
            scale=rule.scale,
            **_window(pass_, rule),
        )
        if totals is None:
            sums = [_put_back(each, keys, like) for each, like in zip(gradients[1:], inputs[1:], strict=True)]
            return QKV(gradients[0], *sums)
        for total, gradient, index in zip(totals, gradients, (queries, keys, keys), strict=True):
            if index is None:
                total.add_(gradient)
            else:
                total.index_add_(0, index, gradient)
        return totals


def _taken(tensor: Tensor, index: Tensor | None) -> Tensor:
    return tensor if index is None else tensor[index]


def _put_back(gradient: Tensor, index: Tensor | None, like: Tensor) -> Tensor:
    """Sum the gradients of tokens that were taken, some of them several times, in at least fp32."""
    if index is None:
        return gradient
    total = torch.zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    return total.index_add_(0, index, gradient.to(total.dtype)).to(like.dtype)


def _window(pass_: AttentionPass, rule: ScoreRule) -> dict[str, int]:
    """Return the operator's arguments: how many keys before and behind its own place a query sees."""
    if rule.window is None or not _is_windowed(pass_, rule):
        return {}
    return {"window_size_left": rule.window - 1, "window_size_right": 0}


@dataclass(frozen=True)
class BatchedKernels:
    """Passes by a dense kernel, which is called for each run of blocks of equal shape.

    See AttentionKernels.
    """

    dense: DenseKernel

    def forward(self, inputs: QKV, pass_: AttentionPass, rule: ScoreRule) -> Attended:
        """See AttentionKernels."""
        query = inputs.query
        lse_dtype = torch.promote_types(query.dtype, torch.float32)
        whole = Attended(torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0], dtype=lse_dtype))
        for queries, part in self._parts(inputs, pass_, rule):
            for total, each in zip(queries.attended(whole), part, strict=True):
                total.copy_(each)
        return whole

    def merge(self, merged: Attended, inputs: QKV, pass_: AttentionPass, rule: ScoreRule) -> None:
        """See AttentionKernels."""
        for queries, part in self._parts(inputs, pass_, rule):
            merge_(queries.attended(merged), part)

    def gradients(
        self, totals: QKV | None, grad: Tensor, inputs: QKV, merged: Attended, pass_: AttentionPass, rule: ScoreRule
    ) -> QKV:
        """See AttentionKernels."""
        put: Callable[[Tensor, Tensor], Tensor] = Tensor.copy_ if totals is None else Tensor.add_
        found = totals or QKV(*(torch.empty_like(each) for each in inputs))
        for queries, keys in _equal_blocks(pass_):
            blocks = _blocks(pass_, queries, keys)
            gradients = self.dense.backward(
                queries.heads(grad), _operands(inputs, queries, keys), queries.attended(merged), blocks, rule
            )
            for total, gradient in zip(_operands(found, queries, keys), gradients, strict=True):
                put(total, gradient)
        return found

    def _parts(self, inputs: QKV, pass_: AttentionPass, rule: ScoreRule) -> Iterator[tuple[EqualBlocks, Attended]]:
        """Yield runs of query blocks, each with its attention."""
        for queries, keys in _equal_blocks(pass_):
            yield queries, self.dense.forward(_operands(inputs, queries, keys), _blocks(pass_, queries, keys), rule)


@dataclass(frozen=True)
class EqualBlocks:
    """`count` blocks of `length` tokens that begin every `step` tokens, the first at `start`.

    Tensors are read through views.
    """

    start: int
    step: int
    count: int
    length: int

    def cut(self, tensor: Tensor) -> Tensor:
        """Cut [N, *] into blocks [count, *, length], as a view."""
        stop = self.start + (self.count - 1) * self.step + self.length
        return tensor[self.start : stop].unfold(0, self.length, self.step)

    def heads(self, tensor: Tensor) -> Tensor:
        """Cut [N, heads, d] into blocks [count, heads, length, d], as a view."""
        return self.cut(tensor).transpose(2, 3)

    def attended(self, whole: Attended) -> Attended:
        """Cut output [count, heads, length, d] and LSE [count, heads, length], as views."""
        return Attended(self.heads(whole.output), self.cut(whole.lse.t()))


def _operands(whole: QKV, queries: EqualBlocks, keys: EqualBlocks) -> QKV:
    """Cut query [b, hq, q, d], key and value [b, hkv, k, d] of these blocks, as views."""
    return QKV(queries.heads(whole.query), keys.heads(whole.key), keys.heads(whole.value))


def _blocks(pass_: AttentionPass, queries: EqualBlocks, keys: EqualBlocks) -> Blocks:
    return Blocks(pass_.causal, queries.cut(pass_.query_positions), keys.cut(pass_.key_positions))


def _equal_blocks(pass_: AttentionPass) -> tuple[tuple[EqualBlocks, EqualBlocks], ...]:
    """List the runs of blocks of equal shape of a pass, as query blocks and key blocks."""
    return _runs(pass_.query_starts, pass_.query_lengths, pass_.key_starts, pass_.key_lengths)


@lru_cache(maxsize=64)
def _runs(
    query_starts: tuple[int, ...],
    query_lengths: tuple[int, ...],
    key_starts: tuple[int, ...],
    key_lengths: tuple[int, ...],
) -> tuple[tuple[EqualBlocks, EqualBlocks], ...]:
    """Join consecutive blocks of equal shape that lie at equal distances."""
    runs: list[tuple[EqualBlocks, EqualBlocks]] = []
    for query, queries, key, keys in zip(query_starts, query_lengths, key_starts, key_lengths, strict=True):
        longer = _joined(runs[-1], (query, queries), (key, keys)) if runs else None
        if longer is not None:
            runs[-1] = longer
        else:
            runs.append((EqualBlocks(query, queries, 1, queries), EqualBlocks(key, keys, 1, keys)))
    return tuple(runs)


def _joined(
    run: tuple[EqualBlocks, EqualBlocks], queries: tuple[int, int], keys: tuple[int, int]
) -> tuple[EqualBlocks, EqualBlocks] | None:
    """Join a run and one more block (first token, length); None if it does not continue the run."""
    longer = []
    for blocks, (start, length) in zip(run, (queries, keys), strict=True):
        step = start - blocks.start if blocks.count == 1 else blocks.step
        if length != blocks.length or start != blocks.start + blocks.count * step:
            return None
        longer.append(replace(blocks, step=step, count=blocks.count + 1))
    return longer[0], longer[1]
