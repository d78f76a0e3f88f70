"""The layout of one pass of generation.

A pass through the model carries the newest token of every active candidate and, behind them, whole
prompts that are being admitted, packed one after another:

    [ active candidate 0 .. m-1 | prompt a | prompt b | ... | padding ]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exo_megatron.models.attention.cache import ActiveTokens, KvCache, attend_cached, int64_on, place_active
from exo_megatron.models.attention.kernels import kernels_for
from exo_megatron.models.attention.passes import QKV, ScoreRule
from exo_megatron.models.layouts.groups import GroupLayout, build_layout


@dataclass(frozen=True)
class _Prefill:
    """The admitted prompts, and the place of their p tokens in the cache.

    Attributes:
        prompts: their layout, as groups without candidates.
        slots, places: [p] int64, cache slot and place of each token.
    """

    prompts: GroupLayout
    slots: Tensor
    places: Tensor


@dataclass(frozen=True)
class DecodeLayout:
    """One pass of generation over S tokens.

    input_ids, position_ids: [S] int64. predict_index [m + admitted prompts] int64: the tokens whose
    hidden state predicts a next token, active candidates first, then the last token of each
    admitted prompt.
    """

    cache: KvCache
    input_ids: Tensor
    position_ids: Tensor
    predict_index: Tensor
    num_tokens: int
    active: ActiveTokens | None
    prefill: _Prefill | None
    qkv_format: str = "candidate_decode"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, layer_number: int, rule: ScoreRule) -> Tensor:
        """Store keys and values in the cache of the layer, and attend to the cache. Forward only.

        See Layout. hq is a multiple of hkv (query head h reads KV head h // (hq / hkv)). The result
        has the dtype of query and is zero for padding. Softmax and the sums of the cached part are
        in fp32.
        """
        layer = self.cache.layer_index[layer_number]
        parts: list[Tensor] = []
        done = 0
        if self.active is not None:
            done = self.active.count
            newest = QKV(query[:done], key[:done], value[:done])
            parts.append(attend_cached(*newest, self.cache, layer, self.active, rule))
        if self.prefill is not None:
            end = done + self.prefill.slots.shape[0]
            admitted = QKV(query[done:end], key[done:end], value[done:end])
            parts.append(_attend_prompts(admitted, self.cache, layer, self.prefill, rule))
            done = end
        if done < self.num_tokens:
            parts.append(query.new_zeros(self.num_tokens - done, *query.shape[1:]))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def predicting(self, hidden: Tensor) -> Tensor:
        """See Layout."""
        return hidden[self.predict_index, 0]

    def candidate_ends(self, hidden: Tensor) -> Tensor:
        """Raise TypeError: scores belong to whole candidates. See Layout."""
        raise TypeError("a pass of generation has no scores: a reward model does not generate")


def build_decode_layout(
    cache: KvCache,
    *,
    active: Sequence[tuple[int, int, int]],
    prompt_lengths: Sequence[int],
    admitted: Sequence[tuple[int, Sequence[int]]],
    multiple: int,
    device: torch.device,
) -> DecodeLayout:
    """Lay out one pass. At least one candidate or prompt must be given.

    Args:
        cache: the KV cache that the pass reads and writes.
        active: for candidate slots 0..m-1 the token to feed, its prompt's slot, and how many tokens
            of the candidate are already cached.
        prompt_lengths: of prompt slots 0..n-1 (the admitted ones included), in tokens.
        admitted: slot and ids of the prompts to prefill.
        multiple: the pass is padded to a multiple of this many tokens.
        device: where the tensors are put.
    """
    ids = [token for token, _, _ in active]
    positions = [prompt_lengths[slot] + cached for _, slot, cached in active]
    predict_index = list(range(len(active)))
    for _, prompt in admitted:
        ids.extend(prompt)
        positions.extend(range(len(prompt)))
        predict_index.append(len(ids) - 1)
    padding = -len(ids) % multiple
    ids.extend([0] * padding)
    positions.extend([0] * padding)

    prefill = None
    if admitted:
        prefill = _Prefill(
            prompts=build_layout([prompt for _, prompt in admitted], [[] for _ in admitted]).to(device),
            slots=int64_on(device, [slot for slot, prompt in admitted for _ in prompt]),
            places=int64_on(device, [place for _, prompt in admitted for place in range(len(prompt))]),
        )
    return DecodeLayout(
        cache=cache,
        input_ids=int64_on(device, ids),
        position_ids=int64_on(device, positions),
        predict_index=int64_on(device, predict_index),
        num_tokens=len(ids),
        active=place_active(cache, active, prompt_lengths, device) if active else None,
        prefill=prefill,
    )


def _attend_prompts(inputs: QKV, cache: KvCache, layer: int, prefill: _Prefill, rule: ScoreRule) -> Tensor:
    """Attend causally inside each admitted prompt, [p, hq, d], and cache keys and values."""
    cache.prompt_keys[layer][prefill.slots, :, prefill.places] = inputs.key
    cache.prompt_values[layer][prefill.slots, :, prefill.places] = inputs.value
    prompts = prefill.prompts.segment_pass()
    return kernels_for(inputs.query, prompts, rule).forward(inputs, prompts, rule).output
