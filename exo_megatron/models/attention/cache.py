"""Attention of generation over a KV cache that the candidates of a prompt share.

The keys and values of a prompt are stored once, whatever the number of its candidates, and a pass
reads them once for all of them; every candidate has a cache of its own for its generated tokens.
Slots in use are always the first ones, so that attention works on views of the cache without
gathering.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exo_megatron.models.attention.passes import ScoreRule
from exo_megatron.models.numerics import product, soft_cap_


class KvCache:
    """Keys and values of one pipeline stage's layers, for one tensor rank's KV heads.

    prompt_keys, prompt_values: [layers, prompt slots, kv heads, prompt length, d].

    candidate_keys, candidate_values: [layers, candidate slots, kv heads, candidate length, d].

    All are filled with zeros once: attention multiplies unused places by a weight of zero, so they
    must stay finite.
    """

    def __init__(
        self,
        *,
        layer_numbers: Sequence[int],
        prompt_slots: int,
        prompt_length: int,
        candidate_slots: int,
        candidate_length: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate the cache.

        Args:
            layer_numbers: megatron-core's numbers, from 1 over all pipeline stages, of the layers
                that use the cache.
            prompt_slots: prompts at a time.
            prompt_length: tokens of the longest prompt.
            candidate_slots: candidates at a time.
            candidate_length: tokens of a candidate that are cached at most.
            kv_heads: KV heads of this tensor rank.
            head_dim: d.
            dtype: of keys and values.
            device: where the cache is.
        """
        self.layer_index = {number: index for index, number in enumerate(layer_numbers)}
        prompt = (len(layer_numbers), prompt_slots, kv_heads, prompt_length, head_dim)
        candidate = (len(layer_numbers), candidate_slots, kv_heads, candidate_length, head_dim)
        self.prompt_keys = torch.zeros(prompt, dtype=dtype, device=device)
        self.prompt_values = torch.zeros(prompt, dtype=dtype, device=device)
        self.candidate_keys = torch.zeros(candidate, dtype=dtype, device=device)
        self.candidate_values = torch.zeros(candidate, dtype=dtype, device=device)
        self._of_prompts = _by_layer(self.prompt_keys, self.prompt_values)
        self._of_candidates = _by_layer(self.candidate_keys, self.candidate_values)

    def of_prompts(self, layer: int, slots: int, length: int) -> tuple[Tensor, Tensor]:
        """View keys and values of the first slots and places, [slots * kv heads, length, d]."""
        return self._seen(self._of_prompts[layer], slots, length)

    def of_candidates(self, layer: int, slots: int, length: int) -> tuple[Tensor, Tensor]:
        """View keys and values of the first slots and places, [slots * kv heads, length, d]."""
        return self._seen(self._of_candidates[layer], slots, length)

    def _seen(self, layer: tuple[Tensor, Tensor], slots: int, length: int) -> tuple[Tensor, Tensor]:
        lines = slots * self.prompt_keys.shape[2]
        return layer[0][:lines, :length], layer[1][:lines, :length]

    def candidate_places(self, own_index: Tensor) -> Tensor:
        """Compute where the tokens at own_index [m] of slots 0..m-1 are stored, [m * kv heads].

        The places count those of all slots and heads of a layer.
        """
        heads, length = self.candidate_keys.shape[2:4]
        slots = torch.arange(own_index.shape[0] * heads, device=own_index.device)
        return slots.mul_(length).view(-1, heads).add_(own_index.unsqueeze(1)).flatten()

    def store_newest(self, layer: int, key: Tensor, value: Tensor, places: Tensor) -> None:
        """Store key and value [m, kv heads, d] of a layer at `candidate_places`."""
        for stored, newest in zip(self._of_candidates[layer], (key, value), strict=True):
            stored.view(-1, newest.shape[2]).index_copy_(0, places, newest.reshape(-1, newest.shape[2]))

    def move_prompts(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy prompt slots of all layers, given (source, destination) pairs.

        No destination may be the source of another pair.
        """
        _move_slots((self.prompt_keys, self.prompt_values), moves)

    def move_candidates(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy candidate slots of all layers, given (source, destination) pairs.

        No destination may be the source of another pair.
        """
        _move_slots((self.candidate_keys, self.candidate_values), moves)


def _by_layer(keys: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """View keys and values of each layer as [slots * kv heads, length, d]."""
    return [(key.flatten(0, 1), value.flatten(0, 1)) for key, value in zip(keys, values, strict=True)]


def _move_slots(caches: tuple[Tensor, Tensor], moves: Sequence[tuple[int, int]]) -> None:
    for source, destination in moves:
        for cache in caches:
            cache[:, destination].copy_(cache[:, source])


@dataclass(frozen=True)
class ActiveTokens:
    """Index tensors of the newest tokens of the m active candidates; token i is of slot i.

    For the attention to prompts, tokens are arranged in a grid of `prompts` x `lanes`, one line per
    prompt slot.

    Attributes:
        own_index: [m] int64, place of the token in the candidate's cache.
        positions: [m] int64, of the tokens.
        store_index: [m * kv heads] int64, place of each token and head among all places of a
            layer's candidate cache.
        grid_index: [prompts * lanes] int64, the token at each place of the grid; 0 where there is
            none. None: the grid holds the tokens in order, without a gap.
        grid_places: [m] int64, the place of each token in the grid; None likewise.
        longest_prompt, longest_own: places of the cache that are read, of prompts and candidates.
        longest: the largest position plus 1.
        biases: those made so far, see `bias`.
    """

    prompts: int
    lanes: int
    own_index: Tensor
    positions: Tensor
    store_index: Tensor
    grid_index: Tensor | None
    grid_places: Tensor | None
    longest_prompt: int
    longest_own: int
    longest: int
    biases: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number m of active candidates."""
        return self.own_index.shape[0]

    def bias(self, window: int | None) -> Tensor:
        """Return the bias of scores on the grid, [prompts, 1, lanes, 1, longest prompt + own] fp32.

        0 on stored tokens inside of the window, -inf elsewhere. Layers with equal windows share it.
        """
        limit = None if window is None or self.longest <= window else window
        if limit not in self.biases:
            hidden = self._hidden(limit)[:, None, None, :]
            bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))
            self.biases[limit] = self.on_grid(bias)
        return self.biases[limit]

    def _hidden(self, window: int | None) -> Tensor:
        """Tell which places of its prompt's cache and of its own each token does not see."""
        places = torch.arange(max(self.longest_prompt, self.longest_own), device=self.own_index.device)
        on_prompt, own = places[: self.longest_prompt], places[: self.longest_own]
        stored = (self.positions - self.own_index).unsqueeze(1)
        hidden = torch.cat((on_prompt >= stored, own > self.own_index.unsqueeze(1)), dim=1)
        if window is not None:
            first = (self.positions - window + 1).unsqueeze(1)  # the first position that a token sees
            hidden |= torch.cat((on_prompt < first, own + stored < first), dim=1)
        return hidden

    def on_grid(self, tokens: Tensor) -> Tensor:
        """Arrange [m, heads, queries, n] by prompts: [prompts, heads, lanes, queries, n]."""
        placed = tokens if self.grid_index is None else tokens.index_select(0, self.grid_index)
        return placed.view(self.prompts, self.lanes, *tokens.shape[1:]).transpose(1, 2)

    def from_grid(self, grid: Tensor) -> Tensor:
        """Undo `on_grid`."""
        by_lane = grid.transpose(1, 2).flatten(0, 1)
        return by_lane if self.grid_places is None else by_lane.index_select(0, self.grid_places)


def place_active(
    cache: KvCache, active: Sequence[tuple[int, int, int]], prompt_lengths: Sequence[int], device: torch.device
) -> ActiveTokens:
    """Arrange the newest tokens by their prompts. See `build_decode_layout`."""
    of_slot: dict[int, list[int]] = {}
    for token, (_, slot, _) in enumerate(active):
        of_slot.setdefault(slot, []).append(token)
    # Slots beyond the last one with an active candidate (prompts admitted in this pass) have no
    # line.
    prompts = 1 + max(of_slot)
    lanes = max(len(tokens) for tokens in of_slot.values())
    grid_index = [0] * (prompts * lanes)
    grid_places = [0] * len(active)
    for slot, tokens in of_slot.items():
        for lane, token in enumerate(tokens):
            grid_index[slot * lanes + lane] = token
            grid_places[token] = slot * lanes + lane
    in_order = len(grid_index) == len(active) and grid_places == list(range(len(active)))
    own_index = int64_on(device, [cached for _, _, cached in active])
    positions = [prompt_lengths[slot] + cached for _, slot, cached in active]
    return ActiveTokens(
        prompts=prompts,
        lanes=lanes,
        own_index=own_index,
        positions=int64_on(device, positions),
        store_index=cache.candidate_places(own_index),
        grid_index=None if in_order else int64_on(device, grid_index),
        grid_places=None if in_order else int64_on(device, grid_places),
        longest_prompt=max(prompt_lengths[slot] for slot in range(prompts)),
        longest_own=1 + max(cached for _, _, cached in active),
        longest=1 + max(positions),
    )


def int64_on(device: torch.device, values: Sequence[int]) -> Tensor:
    """Make an int64 tensor on the device, without waiting for it."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def attend_cached(
    q: Tensor, k: Tensor, v: Tensor, cache: KvCache, layer: int, active: ActiveTokens, rule: ScoreRule
) -> Tensor:
    """Attend with one query per candidate over its prompt's cache and its own, as one softmax.

    The new keys and values are stored in the candidates' cache first. Scores of both parts are
    computed where their keys are, a prompt's for all its candidates at once, and then lie side by
    side.

    Args:
        q: [m, hq, d], rotated.
        k, v: [m, hkv, d], key rotated.
        cache: the KV cache, which is written.
        layer: index of the layer in the cache.
        active: places of the tokens.
        rule: how scores are computed.

    Returns:
        [m, hq, d] in the dtype of q.
    """
    count, query_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    cache.store_newest(layer, k, v, active.store_index)
    grouped = q.reshape(count, kv_heads, query_heads // kv_heads, head_dim)
    prompt_length, own_length = active.longest_prompt, active.longest_own
    prompt_keys, prompt_values = cache.of_prompts(layer, active.prompts, prompt_length)
    own_keys, own_values = cache.of_candidates(layer, count, own_length)

    lines = active.on_grid(grouped)  # [prompts, kv heads, lanes, query heads of a kv head, d]
    on_prompt = _products(lines, prompt_keys.transpose(1, 2))
    scores = on_prompt.new_empty(*lines.shape[:4], prompt_length + own_length)
    scores[..., :prompt_length].copy_(on_prompt)
    scores[..., prompt_length:].copy_(active.on_grid(_products(grouped, own_keys.transpose(1, 2))))
    if rule.softcap is None:
        torch.add(active.bias(rule.window), scores, alpha=rule.scale, out=scores)
    else:
        soft_cap_(scores.mul_(rule.scale), rule.softcap).add_(active.bias(rule.window))
    weights = scores.softmax(-1).to(v.dtype)
    from_prompt = _products(weights[..., :prompt_length], prompt_values)
    attended = _products(active.from_grid(weights[..., prompt_length:]), own_values)
    return attended.add_(active.from_grid(from_prompt)).view(count, query_heads, head_dim).to(q.dtype)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Multiply [n, h, ..., b] by head with [n * h, b, c]: [n, h, ..., c] fp32."""
    lines = left.reshape(right.shape[0], -1, left.shape[-1])
    return product(lines, right).view(*left.shape[:-1], right.shape[2])
