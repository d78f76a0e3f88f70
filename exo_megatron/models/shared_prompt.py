"""A group in parts: its prompt passes through the model once, its candidates afterwards, some at a time.

For a group that does not fit into one row. The prompt's pass leaves in a `SharedPrompt` what its candidates need of
it: the rotated keys and values of every layer of this pipeline stage and, on the last stage, the hidden state of the
last prompt token, which predicts the first token of every candidate. The passes of the parts read it, and their
backward passes add the gradients of what they read to it; the prompt's backward, last of all, takes the sums up. So
the activations in memory are those of the prompt and of one part. The layouts of such passes travel through
megatron-core's forward pass as `packed_seq_params`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from exo_megatron.models.attention_pass import AttentionPass
from exo_megatron.models.layout import GroupLayout, build_layout


class SharedTensor:
    """What the prompt's pass computed and the parts read: `value`, and the sum of the parts' gradients so far."""

    def __init__(self, value: Tensor) -> None:
        self.value = value.detach()
        self._gradient: Tensor | None = None

    @property
    def gradient(self) -> Tensor:
        """The sum, of the shape of `value`, to add to; in fp32 (fp64 for fp64), however many parts there are."""
        if self._gradient is None:
            dtype = torch.promote_types(self.value.dtype, torch.float32)
            self._gradient = torch.zeros(self.value.shape, dtype=dtype, device=self.value.device)
        return self._gradient


class SharedPrompt:
    """What the parts of a group need of its prompt, of `length` P tokens, on this rank.

    keys, values: by megatron's layer number, [P, hkv, d], rotated, for the local layers and heads. hidden: [1, H] on
    the last stage (rows of the output of the prompt's pass; [0, H] where there is no prompt).
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.keys: dict[int, SharedTensor] = {}
        self.values: dict[int, SharedTensor] = {}
        self.hidden: SharedTensor | None = None

    def tap(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """In the prompt's pass: keep the layer's key and value [S, hkv, d]; the same, whose backward adds the sums.

        A recomputation of the layer finds them kept and leaves them alone.
        """
        if layer_number not in self.keys:
            kept_key, kept_value = key[: self.length], value[: self.length]
            if not torch.is_grad_enabled():
                # A layer that will be recomputed: no graph holds what these are views of, queries and all, but they.
                kept_key, kept_value = kept_key.clone(), kept_value.clone()
            self.keys[layer_number] = SharedTensor(kept_key)
            self.values[layer_number] = SharedTensor(kept_value)
        apply: Callable[..., Tensor] = _Tap.apply
        return apply(key, self.keys[layer_number]), apply(value, self.values[layer_number])

    def keep_hidden(self, hidden: Tensor) -> None:
        """In the prompt's pass on the last stage: keep its output [1, H]."""
        self.hidden = SharedTensor(hidden)

    def before(self, rows: Tensor) -> Tensor:
        """In a part's pass on the last stage: the prompt's hidden state in front of the part's rows, [1 + rows, H]."""
        apply: Callable[..., Tensor] = _Before.apply
        return apply(rows, self._kept())

    def hidden_gradient(self) -> Tensor:
        """After the parts, on the last stage: the gradient of the output of the prompt's pass, [1, H]."""
        kept = self._kept()
        return kept.gradient.to(kept.value.dtype)

    def _kept(self) -> SharedTensor:
        if self.hidden is None:
            raise RuntimeError("the last stage has not run the prompt yet")
        return self.hidden


class _Tap(torch.autograd.Function):
    """Identity, whose backward adds what the parts have left to the gradient of the first rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shared: SharedTensor) -> Tensor:
        ctx.shared = shared
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        total[: ctx.shared.value.shape[0]] += ctx.shared.gradient
        return total, None


class _Before(torch.autograd.Function):
    """Shared rows in front of own ones."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shared: SharedTensor) -> Tensor:
        ctx.shared = shared
        return torch.cat((shared.value, rows))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        count = ctx.shared.value.shape[0]
        ctx.shared.gradient.add_(grads[0][:count])
        return grads[0][count:], None


@dataclass(frozen=True)
class PromptLayout:
    """The pass of a prompt alone. row: a group without candidates, or padding only where a rank has no group."""

    row: GroupLayout
    shared: SharedPrompt
    # What megatron-core reads from packed_seq_params, as in GroupLayout.
    qkv_format: str = "candidate_prompt"
    cp_group: None = None

    @property
    def position_ids(self) -> Tensor:
        """[S] int64."""
        return self.row.position_ids

    @property
    def max_seqlen_q(self) -> int:
        """Longest causal segment."""
        return self.row.max_seqlen_q

    @property
    def max_seqlen_kv(self) -> int:
        """Longest causal segment."""
        return self.row.max_seqlen_kv


@dataclass(frozen=True)
class PartLayout:
    """The pass of a part: N tokens of some candidates of one group, and padding behind them.

    row: their layout. Its `predict_rows` leave out the shared prompt row, to which index 0 of `token_row` refers: it
    stands in front of them in the last stage's output, where there are candidates. prompt: the second attention pass,
    of the first N rows over the prompt's stored keys; None for a row of padding only.
    """

    row: GroupLayout
    prompt: AttentionPass | None
    shared: SharedPrompt
    qkv_format: str = "candidate_part"
    cp_group: None = None

    @property
    def position_ids(self) -> Tensor:
        """[S] int64."""
        return self.row.position_ids

    @property
    def max_seqlen_q(self) -> int:
        """Longest causal segment."""
        return self.row.max_seqlen_q

    @property
    def max_seqlen_kv(self) -> int:
        """Tokens of the prompt, or the longest causal segment if that is longer."""
        return max(self.row.max_seqlen_kv, self.shared.length)

    def predicting(self, rows: Tensor) -> Tensor:
        """On the last stage: all hidden states that predict a token of the part, from those of its own rows."""
        return rows if self.prompt is None else self.shared.before(rows)


def build_prompt_layout(prompt: Sequence[int], *, multiple: int, device: torch.device) -> PromptLayout:
    """The pass of a prompt of P token ids, on `device`; P = 0 gives a row of padding."""
    row = build_layout([prompt] if prompt else [], [[]] if prompt else [], multiple=multiple)
    return PromptLayout(row.to(device), SharedPrompt(len(prompt)))


def build_part_layout(
    shared: SharedPrompt, candidates: Sequence[Sequence[int]], *, multiple: int, device: torch.device
) -> PartLayout:
    """The pass of some candidates (lists of R_k >= 1 ids) of the prompt, on `device`; none gives a row of padding."""
    if not candidates:
        return PartLayout(build_layout([], [], multiple=multiple).to(device), None, shared)
    row = _without_prompt(build_layout([[0] * shared.length], [candidates]), shared.length, multiple).to(device)
    tokens = sum(len(candidate) for candidate in candidates)
    second = AttentionPass(
        causal=False,
        query_lengths=(tokens,),
        key_lengths=(shared.length,),
        query_starts=(0,),
        key_starts=(0,),
        query_rows=torch.arange(tokens, device=device),
        key_rows=None,
        query_bounds=torch.tensor((0, tokens), dtype=torch.int32, device=device),
        key_bounds=torch.tensor((0, shared.length), dtype=torch.int32, device=device),
        query_positions=row.position_ids,
        key_positions=torch.arange(shared.length, device=device),
        longest=shared.length + max(len(candidate) for candidate in candidates),
    )
    return PartLayout(row, second, shared)


def _without_prompt(whole: GroupLayout, prompt: int, multiple: int) -> GroupLayout:
    """The layout of one group, unpadded, without its prompt of that many tokens, padded to a multiple."""
    padding = -(whole.row_length - prompt) % multiple
    segments = whole.segment_lengths[1:] + ((padding,) if padding else ())
    none = torch.zeros(0, dtype=torch.int64)
    return replace(
        whole,
        groups=(),  # and so no second pass inside the row
        row_length=whole.row_length - prompt + padding,
        input_ids=torch.cat((whole.input_ids[prompt:], torch.zeros(padding, dtype=torch.int64))),
        position_ids=torch.cat((whole.position_ids[prompt:], torch.arange(padding))),
        segment_lengths=segments,
        segment_cu_seqlens=torch.tensor((0, *segments)).cumsum(0).to(torch.int32),
        response_rows=none,
        prompt_rows=none,
        response_cu_seqlens=torch.zeros(1, dtype=torch.int32),
        prompt_cu_seqlens=torch.zeros(1, dtype=torch.int32),
        predict_rows=whole.predict_rows[1:] - prompt,
        last_rows=whole.last_rows - prompt,
    )
