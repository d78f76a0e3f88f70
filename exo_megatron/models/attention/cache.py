"""Attention of generation over a KV cache that the candidates of a prompt share.

The keys and values of a prompt are stored once, whatever the number of its candidates, and a pass
reads them once for all of them; every candidate has a cache of its own for its generated tokens.
Slots in use are always the first ones, so that attention works on views of the cache without
gathering.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def _move_slots(caches: tuple[Tensor, Tensor], moves: Sequence[tuple[int, int]]) -> None:
    for source, destination in moves:
        for cache in caches:
            cache[:, destination].copy_(cache[:, source])


@dataclass(frozen=True)
class ActiveTokens:
    """Index tensors of the newest tokens of the m active candidates; token i is of slot i.

    Tokens are arranged in a grid of `prompts` x `lanes`, one line per prompt slot.

    Attributes:
        index: [m] int64, 0..m-1.
        own_index: [m] int64, place of the token in the candidate's cache.
        grid_index: [prompts * lanes] int64, the token at each place of the grid; 0 where there is
            none.
        grid_places: [m] int64, the place of each token in the grid.
        prompt_bias: [prompts, 1, longest prompt] fp32, 0 on stored tokens, -inf behind them.
        own_bias: [m, 1, longest candidate] fp32, likewise.
        positions: [m] int64, of the tokens.
        longest: the largest position plus 1.
    """

    prompts: int
    lanes: int
    index: Tensor
    own_index: Tensor
    grid_index: Tensor
    grid_places: Tensor
    prompt_bias: Tensor
    own_bias: Tensor
    positions: Tensor
    longest: int

    @property
    def count(self) -> int:
        """Number m of active candidates."""
        return self.index.shape[0]


def place_active(
    active: Sequence[tuple[int, int, int]], prompt_lengths: Sequence[int], device: torch.device
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
    stored = int64_on(device, [prompt_lengths[slot] for slot in range(prompts)])
    longest_prompt = max(prompt_lengths[slot] for slot in range(prompts))
    own_index = int64_on(device, [cached for _, _, cached in active])
    positions = [prompt_lengths[slot] + cached for _, slot, cached in active]
    longest_own = 1 + max(cached for _, _, cached in active)
    return ActiveTokens(
        prompts=prompts,
        lanes=lanes,
        index=torch.arange(len(active), device=own_index.device),
        own_index=own_index,
        grid_index=int64_on(device, grid_index),
        grid_places=int64_on(device, grid_places),
        prompt_bias=_length_bias(stored, longest_prompt),
        own_bias=_length_bias(own_index + 1, longest_own),
        positions=int64_on(device, positions),
        longest=1 + max(positions),
    )


def int64_on(device: torch.device, values: Sequence[int]) -> Tensor:
    """Make an int64 tensor on the device, without waiting for it."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def _length_bias(lengths: Tensor, longest: int) -> Tensor:
    """Make a bias [n, 1, longest] fp32: 0 at places below lengths [n], -inf from there on."""
    beyond = torch.arange(longest, device=lengths.device) >= lengths[:, None]
    return torch.zeros(beyond.shape, device=lengths.device).masked_fill_(beyond, float("-inf"))[:, None, :]


def _biases(active: ActiveTokens, shared: int, window: int | None) -> tuple[Tensor, Tensor]:
    """Compute the biases of prompts and candidates, with -inf outside of each token's window.

    With a window shorter than the texts, the bias of prompts has a line per query, [prompts, lanes
    * shared, longest prompt], because the lanes of a prompt are at different positions. shared:
    query heads per KV head.
    """
    if window is None or active.longest <= window:
        return active.prompt_bias, active.own_bias
    first = (active.positions - window + 1).unsqueeze(1)  # the first position that a token sees
    on_grid = first[active.grid_index].view(active.prompts, active.lanes, 1).repeat_interleave(shared, dim=1)
    prompt_length = (active.positions - active.own_index).unsqueeze(1)
    on_own = (first - prompt_length).unsqueeze(1)

    def hide(bias: Tensor, first: Tensor) -> Tensor:
        places = torch.arange(bias.shape[-1], device=bias.device)
        return bias.masked_fill(places < first, float("-inf"))

    return hide(active.prompt_bias, on_grid), hide(active.own_bias, on_own)


def attend_cached(
    q: Tensor, k: Tensor, v: Tensor, cache: KvCache, layer: int, active: ActiveTokens, rule: ScoreRule
) -> Tensor:
    """Attend with one query per candidate over its prompt's cache and its own, as one softmax.

    The new keys and values are stored in the candidates' cache first. The two parts are computed
    with their own maximum and merged by their sums of exponentials.

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
    shared = query_heads // kv_heads
    own_keys, own_values = cache.candidate_keys[layer], cache.candidate_values[layer]
    own_keys[active.index, :, active.own_index] = k
    own_values[active.index, :, active.own_index] = v

    grouped = q.reshape(count, kv_heads, shared, head_dim)
    prompt_bias, own_bias = _biases(active, shared, rule.window)
    own_length = own_bias.shape[-1]
    own = _weigh(grouped, own_keys[:count, :, :own_length], own_values[:count, :, :own_length], own_bias, rule)

    lines, lanes = active.prompts, active.lanes
    grid = grouped[active.grid_index].view(lines, lanes, kv_heads, shared, head_dim).transpose(1, 2)
    grid = grid.reshape(lines, kv_heads, lanes * shared, head_dim)
    length = prompt_bias.shape[-1]
    on_prompt = _weigh(
        grid,
        cache.prompt_keys[layer, :lines, :, :length],
        cache.prompt_values[layer, :lines, :, :length],
        prompt_bias,
        rule,
    )

    def to_tokens(part: Tensor) -> Tensor:
        by_lane = part.view(lines, kv_heads, lanes, shared, -1).transpose(1, 2).flatten(0, 1)
        return by_lane[active.grid_places]

    sums, maxima, weights = (to_tokens(part) for part in on_prompt)
    own_sums, own_maxima, own_weights = own
    top = torch.maximum(maxima, own_maxima)
    share, own_share = torch.exp(maxima - top), torch.exp(own_maxima - top)
    merged = (sums * share + own_sums * own_share) / (weights * share + own_weights * own_share)
    return merged.reshape(count, query_heads, head_dim).to(q.dtype)


def _weigh(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, rule: ScoreRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute unnormalised attention.

    Args:
        queries: [n, h, r, d].
        keys, values: [n, h, l, d].
        bias: [n, 1 or r, l] fp32, added to the scores.
        rule: how scores are computed.

    Returns:
        fp32 sum_j e_j v_j [n, h, r, d], the maximum score [n, h, r, 1] and sum_j e_j [n, h, r, 1],
        where e_j = exp(score_j - maximum). A query that sees no key has the smallest finite number
        as its maximum and sums of 0.
    """
    lines, heads = queries.shape[:2]
    scores = product(queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2))
    scores = soft_cap_(scores.view(lines, heads, *scores.shape[1:]).mul_(rule.scale), rule.softcap).add_(bias[:, None])
    maxima = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    exponentials = scores.sub_(maxima).exp_()
    weights = exponentials.sum(-1, keepdim=True)
    sums = product(exponentials.flatten(0, 1).to(values.dtype), values.flatten(0, 1))
    return sums.view(queries.shape), maxima, weights
