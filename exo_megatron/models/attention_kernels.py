"""One attention pass over variable-length blocks, on the kernels of each device.

CUDA, half precision: one variable-length flash-attention launch a pass, whatever the number of blocks. Elsewhere: a
call for each run of blocks of equal shape, with the CPU flash kernels. Where flash attention cannot do what is asked
(fp32 on CUDA, a soft cap, a window shorter than the texts), with plain matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from exo_megatron.models.attention_pass import QKV, Attended, AttentionPass, ScoreRule
from exo_megatron.models.dense_attention import Blocks, CpuFlashKernel, DenseKernel, PlainKernel


class AttentionKernels(Protocol):
    """Passes and their backward, which computes with whatever output and LSE it is given.

    Those of the pass alone, or merged with those of other passes over other keys.
    """

    def forward(self, inputs: QKV, which: AttentionPass, rule: ScoreRule) -> Attended:
        """Output and LSE of a pass whose blocks are all rows of the query."""
        ...

    def merge(self, merged: Attended, inputs: QKV, which: AttentionPass, rule: ScoreRule) -> None:
        """Merge a pass into `merged`, in place, which so far is that of passes over other keys."""
        ...

    def gradients(
        self, totals: QKV | None, grad: Tensor, inputs: QKV, merged: Attended, which: AttentionPass, rule: ScoreRule
    ) -> QKV:
        """Gradients of query, key and value through this pass, given the output's, `grad`: added to `totals`.

        None: new tensors, of a pass whose blocks are all rows.
        """
        ...


def kernels_for(query: Tensor, which: AttentionPass, rule: ScoreRule) -> AttentionKernels:
    """The kernels for this tensor's device and dtype that can do what the rule asks for in this pass."""
    if rule.softcap is not None or (rule.window is not None and which.longest > rule.window):
        return BatchedKernels(PlainKernel())
    if query.device.type != "cuda":
        return BatchedKernels(CpuFlashKernel())
    if query.dtype in (torch.bfloat16, torch.float16):
        return FlashVarlenKernels()
    return BatchedKernels(PlainKernel())


def merge_(merged: Attended, other: Attended) -> None:
    """Merge attention over other keys into `merged`, in place; here output [..., d] and LSE [...] of any shape."""
    (output, lse), (other_output, other_lse) = merged, other
    share = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    if output.dtype == share.dtype:
        output.lerp_(other_output, share)
    else:
        output.copy_(torch.lerp(output.to(share.dtype), other_output.to(share.dtype), share))
    lse.copy_(torch.logaddexp(lse, other_lse))


class FlashVarlenKernels:
    """ATen's variable-length flash attention, delimited by cumulative lengths on the device. See AttentionKernels.

    Rows that are not all of a tensor's are gathered first.
    """

    def forward(self, inputs: QKV, which: AttentionPass, rule: ScoreRule) -> Attended:
        """See AttentionKernels."""
        output, lse, _, _, _ = torch.ops.aten._flash_attention_forward(
            _taken(inputs.query, which.query_rows),
            _taken(inputs.key, which.key_rows),
            _taken(inputs.value, which.key_rows),
            which.query_bounds,
            which.key_bounds,
            max(which.query_lengths),
            max(which.key_lengths),
            0.0,
            which.causal,
            False,
            scale=rule.scale,
        )
        return Attended(output, lse)

    def merge(self, merged: Attended, inputs: QKV, which: AttentionPass, rule: ScoreRule) -> None:
        """See AttentionKernels."""
        part, part_lse = self.forward(inputs, which, rule)
        rows = slice(None) if which.query_rows is None else which.query_rows
        own, own_lse = merged.output[rows], merged.lse[:, rows]
        merge_(Attended(own, own_lse.t()), Attended(part, part_lse.t()))
        merged.output[rows], merged.lse[:, rows] = own, own_lse

    def gradients(
        self, totals: QKV | None, grad: Tensor, inputs: QKV, merged: Attended, which: AttentionPass, rule: ScoreRule
    ) -> QKV:
        """See AttentionKernels."""
        # The random state is read only when dropout is on.
        no_rng = torch.zeros(2, dtype=torch.uint64, device=grad.device)
        unused = torch.empty(0, dtype=torch.uint64, device=grad.device)
        own, seen = which.query_rows, which.key_rows
        gradients = torch.ops.aten._flash_attention_backward(
            _taken(grad, own).contiguous(),
            _taken(inputs.query, own),
            _taken(inputs.key, seen),
            _taken(inputs.value, seen),
            _taken(merged.output, own),
            merged.lse.contiguous() if own is None else merged.lse[:, own],
            which.query_bounds,
            which.key_bounds,
            max(which.query_lengths),
            max(which.key_lengths),
            0.0,
            which.causal,
            no_rng,
            unused,
            scale=rule.scale,
        )
        if totals is None:
            return QKV(*gradients)
        for total, gradient, rows in zip(totals, gradients, (own, seen, seen), strict=True):
            if rows is None:
                total.add_(gradient)
            else:
                total.index_add_(0, rows, gradient)
        return totals


def _taken(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


@dataclass(frozen=True)
class BatchedKernels:
    """A pass from a dense kernel, called for each run of blocks of equal shape. See AttentionKernels."""

    dense: DenseKernel

    def forward(self, inputs: QKV, which: AttentionPass, rule: ScoreRule) -> Attended:
        """See AttentionKernels."""
        query = inputs.query
        lse_dtype = torch.promote_types(query.dtype, torch.float32)
        whole = Attended(torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0], dtype=lse_dtype))
        for own, part in self._parts(inputs, which, rule):
            for total, each in zip(own.attended(whole), part, strict=True):
                total.copy_(each)
        return whole

    def merge(self, merged: Attended, inputs: QKV, which: AttentionPass, rule: ScoreRule) -> None:
        """See AttentionKernels."""
        for own, part in self._parts(inputs, which, rule):
            merge_(own.attended(merged), part)

    def gradients(
        self, totals: QKV | None, grad: Tensor, inputs: QKV, merged: Attended, which: AttentionPass, rule: ScoreRule
    ) -> QKV:
        """See AttentionKernels."""
        put: Callable[[Tensor, Tensor], Tensor] = Tensor.copy_ if totals is None else Tensor.add_
        found = totals or QKV(*(torch.empty_like(each) for each in inputs))
        for own, seen in _equal_blocks(which):
            blocks = _blocks(which, own, seen)
            gradients = self.dense.backward(
                own.heads(grad), _operands(inputs, own, seen), own.attended(merged), blocks, rule
            )
            for total, gradient in zip(_operands(found, own, seen), gradients, strict=True):
                put(total, gradient)
        return found

    def _parts(self, inputs: QKV, which: AttentionPass, rule: ScoreRule) -> Iterator[tuple[EqualBlocks, Attended]]:
        """Blocks of queries and what attention gives for them."""
        for own, seen in _equal_blocks(which):
            yield own, self.dense.forward(_operands(inputs, own, seen), _blocks(which, own, seen), rule)


@dataclass(frozen=True)
class EqualBlocks:
    """Blocks of `length` rows that begin every `step` rows, `count` of them, the first at row `start`.

    What is read of a tensor are views.
    """

    start: int
    step: int
    count: int
    length: int

    def of_rows(self, tensor: Tensor) -> Tensor:
        """[N, *] -> [count, *, length]."""
        stop = self.start + (self.count - 1) * self.step + self.length
        return tensor[self.start : stop].unfold(0, self.length, self.step)

    def heads(self, tensor: Tensor) -> Tensor:
        """[N, heads, d] -> [count, heads, length, d]."""
        return self.of_rows(tensor).transpose(2, 3)

    def attended(self, whole: Attended) -> Attended:
        """Of these queries: output [count, heads, length, d] and LSE [count, heads, length]."""
        return Attended(self.heads(whole.output), self.of_rows(whole.lse.t()))


def _operands(whole: QKV, own: EqualBlocks, seen: EqualBlocks) -> QKV:
    """Query [b, hq, q, d], key and value [b, hkv, k, d]."""
    return QKV(own.heads(whole.query), seen.heads(whole.key), seen.heads(whole.value))


def _blocks(which: AttentionPass, own: EqualBlocks, seen: EqualBlocks) -> Blocks:
    return Blocks(which.causal, own.of_rows(which.query_positions), seen.of_rows(which.key_positions))


def _equal_blocks(which: AttentionPass) -> tuple[tuple[EqualBlocks, EqualBlocks], ...]:
    """Query rows and key rows of the blocks of a pass."""
    return _runs(which.query_starts, which.query_lengths, which.key_starts, which.key_lengths)


@lru_cache(maxsize=64)
def _runs(
    query_starts: tuple[int, ...],
    query_lengths: tuple[int, ...],
    key_starts: tuple[int, ...],
    key_lengths: tuple[int, ...],
) -> tuple[tuple[EqualBlocks, EqualBlocks], ...]:
    """Blocks of equal shape one after another, as many as lie at equal distances."""
    runs: list[tuple[EqualBlocks, EqualBlocks]] = []
    for query, queries, key, keys in zip(query_starts, query_lengths, key_starts, key_lengths, strict=True):
        longer = _joined(runs[-1], (query, queries), (key, keys)) if runs else None
        if longer is not None:
            runs[-1] = longer
        else:
            runs.append((EqualBlocks(query, queries, 1, queries), EqualBlocks(key, keys, 1, keys)))
    return tuple(runs)


def _joined(
    run: tuple[EqualBlocks, EqualBlocks], own: tuple[int, int], seen: tuple[int, int]
) -> tuple[EqualBlocks, EqualBlocks] | None:
    """The run and one block more, of which first row and length are given; None where it does not continue the run."""
    longer = []
    for blocks, (start, length) in zip(run, (own, seen), strict=True):
        step = start - blocks.start if blocks.count == 1 else blocks.step
        if length != blocks.length or start != blocks.start + blocks.count * step:
            return None
        longer.append(replace(blocks, step=step, count=blocks.count + 1))
    return longer[0], longer[1]
