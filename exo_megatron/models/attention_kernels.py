"""One attention pass over variable-length blocks, on the kernels of each device.

CUDA, half precision: one variable-length flash-attention launch a pass, whatever the number of blocks. Elsewhere: one
call for all blocks of equal shape, with the CPU flash kernels. Where flash attention cannot do what is asked (fp32 on
CUDA, a soft cap, a window shorter than the texts), with plain matrix products.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from exo_megatron.models.attention_pass import AttentionPass, ScoreRule
from exo_megatron.models.dense_attention import Blocks, CpuFlashKernel, DenseKernel, PlainKernel, Triple


class AttentionKernels(Protocol):
    """A pass and its backward. query and output [N, hq, d], key and value [Q, hkv, d], LSE [hq, N].

    LSE, the log-sum-exp of each query's scores, is fp32 (fp64 for fp64 inputs); of a query that sees no key it is
    -inf, and its output 0. The backward computes with whatever output and LSE it is given: those of the pass alone,
    or merged with those of other passes over other keys.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, which: AttentionPass, rule: ScoreRule
    ) -> tuple[Tensor, Tensor]:
        """Output and LSE."""
        ...

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        which: AttentionPass,
        rule: ScoreRule,
    ) -> Triple:
        """Gradients of query, key and value through this pass, given the gradient of the output."""
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


def merge(output: Tensor, lse: Tensor, rows: Tensor | slice, other_output: Tensor, other_lse: Tensor) -> None:
    """Merge a pass over other keys into `output` [S, hq, d] and `lse` [hq, S], in place, on these rows."""
    own_lse = lse[:, rows]
    merged_lse = torch.logaddexp(own_lse, other_lse)
    own_share = (own_lse - merged_lse).exp().t().unsqueeze(-1)
    other_share = (other_lse - merged_lse).exp().t().unsqueeze(-1)
    output[rows] = (output[rows] * own_share + other_output * other_share).to(output.dtype)
    lse[:, rows] = merged_lse


class FlashVarlenKernels:
    """ATen's variable-length flash attention, delimited by cumulative lengths on the device. See AttentionKernels."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, which: AttentionPass, rule: ScoreRule
    ) -> tuple[Tensor, Tensor]:
        """See AttentionKernels."""
        output, lse, _, _, _ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            which.query_bounds,
            which.key_bounds,
            max(which.query_lengths),
            max(which.key_lengths),
            0.0,
            which.causal,
            False,
            scale=rule.scale,
        )
        return output, lse

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        which: AttentionPass,
        rule: ScoreRule,
    ) -> Triple:
        """See AttentionKernels."""
        # The random state is read only when dropout is on.
        no_rng = torch.zeros(2, dtype=torch.uint64, device=query.device)
        unused = torch.empty(0, dtype=torch.uint64, device=query.device)
        d_query, d_key, d_value = torch.ops.aten._flash_attention_backward(
            grad,
            query,
            key,
            value,
            output,
            lse.contiguous(),
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
        return d_query, d_key, d_value


@dataclass(frozen=True)
class BatchedKernels:
    """A pass from a dense kernel: blocks of equal shape share one call. See AttentionKernels."""

    dense: DenseKernel

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, which: AttentionPass, rule: ScoreRule
    ) -> tuple[Tensor, Tensor]:
        """See AttentionKernels."""
        lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        output = torch.empty_like(query)
        lse = query.new_empty(query.shape[1], query.shape[0], dtype=lse_dtype)
        for own, seen in _equal_blocks(which.query_lengths, which.key_lengths, query.device):
            blocks = Blocks(which, own.index, seen.index)
            q, k, v = own.heads(query), seen.heads(key), seen.heads(value)
            part, part_lse = self.dense.forward(q, k, v, blocks, rule)
            output[own.where] = own.flat(part)
            lse[:, own.where] = part_lse.transpose(0, 1).reshape(lse.shape[0], -1)
        return output, lse

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        which: AttentionPass,
        rule: ScoreRule,
    ) -> Triple:
        """See AttentionKernels."""
        d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for own, seen in _equal_blocks(which.query_lengths, which.key_lengths, query.device):
            blocks = Blocks(which, own.index, seen.index)
            d_out, q, out = (own.heads(tensor) for tensor in (grad, query, output))
            own_lse = lse[:, own.where].view(lse.shape[0], *own.index.shape).transpose(0, 1)
            gradients = self.dense.backward(d_out, q, seen.heads(key), seen.heads(value), out, own_lse, blocks, rule)
            d_query[own.where], d_key[seen.where], d_value[seen.where] = map(_Rows.flat, (own, seen, seen), gradients)
        return d_query, d_key, d_value


@dataclass(frozen=True)
class _Rows:
    """Rows of a tensor that make blocks of equal length: `index` [blocks, length]; `where` selects all of them.

    Blocks that lie one behind the other are a slice, which is read without a copy.
    """

    index: Tensor
    where: slice | Tensor

    @classmethod
    def of(cls, first: list[int], length: int, device: torch.device) -> _Rows:
        """Blocks of `length` rows that begin at these rows."""
        index = torch.tensor(first, device=device)[:, None] + torch.arange(length, device=device)
        stop = first[0] + len(first) * length
        in_line = first == list(range(first[0], stop, length))
        return cls(index, slice(first[0], stop) if in_line else index.flatten())

    def heads(self, tensor: Tensor) -> Tensor:
        """[N, heads, d] -> [blocks, heads, length, d]."""
        return tensor[self.where].view(*self.index.shape, *tensor.shape[1:]).transpose(1, 2)

    def flat(self, part: Tensor) -> Tensor:
        """[blocks, heads, length, d] -> [blocks * length, heads, d]."""
        return part.transpose(1, 2).flatten(0, 1)


@lru_cache(maxsize=64)
def _equal_blocks(
    query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], device: torch.device
) -> tuple[tuple[_Rows, _Rows], ...]:
    """Query rows and key rows of the blocks of each distinct shape."""
    starts: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    query = key = 0
    for shape in zip(query_lengths, key_lengths, strict=True):
        starts[shape].append((query, key))
        query, key = query + shape[0], key + shape[1]
    return tuple(
        (
            _Rows.of([own for own, _ in first], shape[0], device),
            _Rows.of([seen for _, seen in first], shape[1], device),
        )
        for shape, first in starts.items()
    )
