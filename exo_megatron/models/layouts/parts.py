"""The layouts of a group in parts: the prompt passes once, then some candidates at a time.

For a group that does not fit into one micro-batch. The prompt's pass stores in a `SharedPrompt`
what the candidates need of it: the rotated keys and values of every layer of this pipeline stage
and, on the last pipeline stage, the hidden state of the last prompt token, which predicts the first
token of every candidate. The passes of the parts read it, and their backward passes add the
gradients of what they read to it; the prompt's backward, last of all, uses the sums. So the
activations in memory are those of the prompt and of one part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from exo_megatron.models.attention.kernels import attend
from exo_megatron.models.attention.passes import AttentionPass, ScoreRule, StoredKeyValue, StoredTensor
from exo_megatron.models.layouts.groups import GroupLayout, build_layout


class SharedPrompt:
    """Stored results of a prompt's pass on this rank, which the parts of the group need.

    `length`: its P tokens. layers: keys and values by megatron-core's layer number, [P, hkv, d],
    rotated, for the local layers and heads. hidden: [1, H] on the last pipeline stage, the output
    of the prompt's pass; [0, H] where there is no prompt.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.layers: dict[int, StoredKeyValue] = {}
        self.hidden: StoredTensor | None = None

    def tap(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's key and value [S, hkv, d]; return them with a backward that adds the sums.

        A recomputation of the layer finds them kept and does not change them.
        """
        if layer_number not in self.layers:
            kept_key, kept_value = key[: self.length], value[: self.length]
            if not torch.is_grad_enabled():
                # In a layer that will be recomputed no graph holds the tensor of which these are
                # views (it has the queries too), so copies free it.
                kept_key, kept_value = kept_key.clone(), kept_value.clone()
            self.layers[layer_number] = StoredKeyValue(StoredTensor(kept_key), StoredTensor(kept_value))
        apply: Callable[..., Tensor] = _Tap.apply
        stored = self.layers[layer_number]
        return apply(key, stored.key), apply(value, stored.value)

    def keep_hidden(self, hidden: Tensor) -> None:
        """Keep the output [1, H] of the prompt's pass, on the last pipeline stage."""
        self.hidden = StoredTensor(hidden)

    def before(self, hidden: Tensor) -> Tensor:
        """Put the prompt's hidden state in front of those of a part, [m, H] -> [1 + m, H].

        On the last pipeline stage.
        """
        apply: Callable[..., Tensor] = _Before.apply
        return apply(hidden, self._kept())

    def hidden_gradient(self) -> Tensor:
        """Return the gradient [1, H] of the output of the prompt's pass, once the parts have run.

        On the last pipeline stage.
        """
        kept = self._kept()
        return kept.gradient.to(kept.value.dtype)

    def _kept(self) -> StoredTensor:
        if self.hidden is None:
            raise RuntimeError("the last stage has not run the prompt yet")
        return self.hidden


class _Tap(torch.autograd.Function):
    """Identity whose backward adds the gradients left by the parts to that of the first tokens."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shared: StoredTensor) -> Tensor:
        ctx.shared = shared
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        total[: ctx.shared.value.shape[0]] += ctx.shared.gradient
        return total, None


class _Before(torch.autograd.Function):
    """Concatenation of a stored tensor and another one."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, shared: StoredTensor) -> Tensor:
        ctx.shared = shared
        return torch.cat((shared.value, hidden))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        count = ctx.shared.value.shape[0]
        ctx.shared.gradient.add_(grads[0][:count])
        return grads[0][count:], None


@dataclass(frozen=True)
class PromptLayout:
    """The pass of a prompt alone.

    packed: a group without candidates, or padding only on a rank without a group.
    """

    packed: GroupLayout
    shared: SharedPrompt
    input_ids: Tensor
    position_ids: Tensor
    num_tokens: int
    qkv_format: str = "candidate_prompt"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, layer_number: int, rule: ScoreRule) -> Tensor:
        """Attend as the packed prompt does; its keys and values are kept. See Layout."""
        key, value = self.shared.tap(layer_number, key, value)
        return self.packed.attend(query, key, value, layer_number=layer_number, rule=rule)

    def predicting(self, hidden: Tensor) -> Tensor:
        """Select the prompt's last token [1, H], which is kept. See Layout."""
        last = self.packed.predicting(hidden)
        self.shared.keep_hidden(last)
        return last

    def candidate_ends(self, hidden: Tensor) -> Tensor:
        """Select nothing, [0, H]: there are no candidates. See Layout."""
        return self.packed.candidate_ends(hidden)


@dataclass(frozen=True)
class PartLayout:
    """The pass of a part: N tokens of some candidates of one group, and padding behind them.

    packed: their layout. Its `predict_index` leaves out the shared prompt token, to which index 0
    of `token_predictor` refers: in the last pipeline stage's output it stands in front of the
    others, if there are candidates. prompt: the second attention pass, of the first N tokens over
    the prompt's stored keys; None for padding only.
    """

    packed: GroupLayout
    prompt: AttentionPass | None
    shared: SharedPrompt
    input_ids: Tensor
    position_ids: Tensor
    num_tokens: int
    qkv_format: str = "candidate_part"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, layer_number: int, rule: ScoreRule) -> Tensor:
        """Attend to the part's own candidates and to the stored prompt, which gets its gradients.

        See Layout.
        """
        segments = self.packed.segment_pass()
        if self.prompt is None:
            return attend(query, key, value, (segments,), rule)
        return attend(query, key, value, (segments, self.prompt), rule, self.shared.layers[layer_number])

    def predicting(self, hidden: Tensor) -> Tensor:
        """Select the prompt's last token and the part's own predicting ones. See Layout."""
        selected = self.packed.predicting(hidden)
        return selected if self.prompt is None else self.shared.before(selected)

    def candidate_ends(self, hidden: Tensor) -> Tensor:
        """See Layout."""
        return self.packed.candidate_ends(hidden)


def build_prompt_layout(prompt: Sequence[int], *, multiple: int) -> PromptLayout:
    """Lay out the pass of a prompt of P token ids, on the CPU; P = 0 gives padding only."""
    packed = build_layout([prompt] if prompt else [], [[]] if prompt else [], multiple=multiple)
    return PromptLayout(packed, SharedPrompt(len(prompt)), packed.input_ids, packed.position_ids, packed.num_tokens)


def build_part_layout(shared: SharedPrompt, candidates: Sequence[Sequence[int]], *, multiple: int) -> PartLayout:
    """Lay out the pass of some candidates of a prompt (lists of R_k >= 1 ids), on the CPU.

    Without candidates the pass is padding only.
    """
    if candidates:
        whole = build_layout([[0] * shared.length], [candidates])
        packed = _without_prompt(whole, shared.length, multiple)
        prompt = _stored_prompt_pass(packed, [len(candidate) for candidate in candidates], shared.length)
    else:
        packed, prompt = build_layout([], [], multiple=multiple), None
    return PartLayout(packed, prompt, shared, packed.input_ids, packed.position_ids, packed.num_tokens)


def _stored_prompt_pass(packed: GroupLayout, lengths: Sequence[int], prompt_length: int) -> AttentionPass:
    """Describe the pass of a part's candidate tokens over the stored keys of their prompt."""
    tokens = sum(lengths)
    return AttentionPass(
        causal=False,
        query_lengths=(tokens,),
        key_lengths=(prompt_length,),
        query_starts=(0,),
        key_starts=(0,),
        query_index=torch.arange(tokens),
        key_index=None,
        query_bounds=torch.tensor((0, tokens), dtype=torch.int32),
        key_bounds=torch.tensor((0, prompt_length), dtype=torch.int32),
        query_positions=packed.position_ids,
        key_positions=torch.arange(prompt_length),
        longest=prompt_length + max(lengths),
    )


def _without_prompt(whole: GroupLayout, prompt: int, multiple: int) -> GroupLayout:
    """Remove the prompt of so many tokens from one group's unpadded layout, and pad."""
    padding = -(whole.num_tokens - prompt) % multiple
    segments = whole.segment_lengths[1:] + ((padding,) if padding else ())
    none = torch.zeros(0, dtype=torch.int64)
    return replace(
        whole,
        groups=(),  # and so no second pass inside the micro-batch
        num_tokens=whole.num_tokens - prompt + padding,
        input_ids=torch.cat((whole.input_ids[prompt:], torch.zeros(padding, dtype=torch.int64))),
        position_ids=torch.cat((whole.position_ids[prompt:], torch.arange(padding))),
        segment_lengths=segments,
        segment_cu_seqlens=torch.tensor((0, *segments)).cumsum(0).to(torch.int32),
        candidate_index=none,
        prompt_index=none,
        candidates_cu_seqlens=torch.zeros(1, dtype=torch.int32),
        prompts_cu_seqlens=torch.zeros(1, dtype=torch.int32),
        predict_index=whole.predict_index[1:] - prompt,
        last_index=whole.last_index - prompt,
    )
