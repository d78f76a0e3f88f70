"""Attention of generation: a KV cache shared by the candidates of a prompt, and the row layout of one pass.

One pass through the model carries the newest token of every active candidate and, behind them, whole prompts that
are being admitted, packed one after another:

    [ active candidate 0 .. m-1 | prompt a | prompt b | ... | padding ]

The keys and values of a prompt are stored once, whatever the number of its candidates, and a pass reads them once
for all of them; every candidate has a cache of its own for what it has generated. The layout travels through
megatron-core's forward pass as `packed_seq_params`; core attention hands its rotated queries, keys and values to
`DecodeLayout.attend`.

Slots in use are always the first ones, so that attention works on views of the cache, without gathering it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exo_megatron.models.attention_kernels import kernels_for
from exo_megatron.models.attention_pass import QKV, ScoreRule, segment_pass
from exo_megatron.models.layout import GroupLayout, build_layout
from exo_megatron.models.products import product
from exo_megatron.models.shared_prompt import PartLayout, PromptLayout
from exo_megatron.models.softcap import soft_cap_


class KvCache:
    """Keys and values of the local layers of one pipeline stage, for the local KV heads of one tensor rank.

    prompt_keys, prompt_values: [layers, prompt slots, kv heads, prompt length, d].
    candidate_keys, candidate_values: [layers, candidate slots, kv heads, candidate length, d].
    Zero-filled once: attention multiplies unused places by a weight of zero, so they must stay finite.
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
        """layer_numbers: megatron's 1-based global numbers of the layers that will call `attend`."""
        self.layer_index = {number: index for index, number in enumerate(layer_numbers)}
        prompt = (len(layer_numbers), prompt_slots, kv_heads, prompt_length, head_dim)
        candidate = (len(layer_numbers), candidate_slots, kv_heads, candidate_length, head_dim)
        self.prompt_keys = torch.zeros(prompt, dtype=dtype, device=device)
        self.prompt_values = torch.zeros(prompt, dtype=dtype, device=device)
        self.candidate_keys = torch.zeros(candidate, dtype=dtype, device=device)
        self.candidate_values = torch.zeros(candidate, dtype=dtype, device=device)

    def move_prompts(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy prompt slots, all layers: (source, destination) pairs; no destination is another pair's source."""
        _move_slots((self.prompt_keys, self.prompt_values), moves)

    def move_candidates(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy candidate slots, all layers: (source, destination) pairs; no destination is another pair's source."""
        _move_slots((self.candidate_keys, self.candidate_values), moves)


def _move_slots(caches: tuple[Tensor, Tensor], moves: Sequence[tuple[int, int]]) -> None:
    for source, destination in moves:
        for cache in caches:
            cache[:, destination].copy_(cache[:, source])


@dataclass(frozen=True)
class _ActiveRows:
    """Index tensors of the m rows that carry one token each; row i uses candidate slot i.

    rows [m] int64 = 0..m-1; own_index [m]: place of the row's token in the candidate's cache.
    Rows are arranged in a grid of `prompts` x `lanes`, a line per prompt slot: `grid_rows` [prompts * lanes] is the
    row at each place (0 where none), `row_places` [m] the place of each row.
    prompt_bias [prompts, 1, longest prompt] and own_bias [m, 1, longest candidate], fp32: 0 on stored tokens, -inf
    behind them. positions [m] int64: of the rows' tokens; longest: the largest of them plus 1.
    """

    prompts: int
    lanes: int
    rows: Tensor
    own_index: Tensor
    grid_rows: Tensor
    row_places: Tensor
    prompt_bias: Tensor
    own_bias: Tensor
    positions: Tensor
    longest: int


@dataclass(frozen=True)
class _PrefillRows:
    """The packed prompts (as groups without candidates), and the cache slot and place of each token ([p] int64)."""

    prompts: GroupLayout
    slots: Tensor
    places: Tensor


@dataclass(frozen=True)
class DecodeLayout:
    """One pass of generation over a row of S tokens.

    input_ids, position_ids: [S] int64. predict_rows [m + admitted prompts] int64: the rows whose hidden state
    predicts a next token, active candidates first, then the last row of each admitted prompt.
    """

    cache: KvCache
    input_ids: Tensor
    position_ids: Tensor
    predict_rows: Tensor
    row_length: int
    longest: int
    active: _ActiveRows | None
    prefill: _PrefillRows | None
    # What megatron-core reads from packed_seq_params; any format but "thd" passes through to core attention.
    qkv_format: str = "candidate_decode"
    cp_group: None = None

    @property
    def max_seqlen_q(self) -> int:
        """Longest sequence in the cache, prompt and generated tokens."""
        return self.longest

    @property
    def max_seqlen_kv(self) -> int:
        """Longest sequence in the cache, prompt and generated tokens."""
        return self.longest

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, layer_number: int, rule: ScoreRule) -> Tensor:
        """Store the row's keys and values in the cache of layer `layer_number` and attend.

        query [S, hq, d]; key, value [S, hkv, d], rotated, hq a multiple of hkv (query head h reads KV head
        h // (hq / hkv)). Returns [S, hq, d] in the dtype of query; padding rows are zero. Local to the rank.
        Softmax and the sums of the cached part are in fp32.
        """
        layer = self.cache.layer_index[layer_number]
        parts: list[Tensor] = []
        done = 0
        if self.active is not None:
            done = self.active.rows.shape[0]
            own = (query[:done], key[:done], value[:done])
            parts.append(_attend_cached(*own, self.cache, layer, self.active, rule))
        if self.prefill is not None:
            end = done + self.prefill.slots.shape[0]
            own = (query[done:end], key[done:end], value[done:end])
            parts.append(_attend_prompts(*own, self.cache, layer, self.prefill, rule))
            done = end
        if done < self.row_length:
            parts.append(query.new_zeros(self.row_length - done, *query.shape[1:]))
        return torch.cat(parts)


Layout = GroupLayout | PromptLayout | PartLayout | DecodeLayout
"""What travels through megatron-core's forward pass as `packed_seq_params`."""


def build_decode_layout(
    cache: KvCache,
    *,
    active: Sequence[tuple[int, int, int]],
    prompt_lengths: Sequence[int],
    admitted: Sequence[tuple[int, Sequence[int]]],
    multiple: int,
    device: torch.device,
) -> DecodeLayout:
    """Lay out one pass.

    active: for candidate slots 0..m-1 the token to feed, its prompt's slot, and how many tokens of the candidate
    are already cached. prompt_lengths: of prompt slots 0..n-1 (the admitted ones included). admitted: slot and ids
    of the prompts to prefill. multiple: the row is padded to a multiple of this. At least one row must be given.
    """
    ids = [token for token, _, _ in active]
    positions = [prompt_lengths[slot] + cached for _, slot, cached in active]
    predict_rows = list(range(len(active)))
    for _, prompt in admitted:
        ids.extend(prompt)
        positions.extend(range(len(prompt)))
        predict_rows.append(len(ids) - 1)
    longest = 1 + max(positions)
    padding = -len(ids) % multiple
    ids.extend([0] * padding)
    positions.extend([0] * padding)

    def int64(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

    prefill = None
    if admitted:
        prefill = _PrefillRows(
            prompts=build_layout([prompt for _, prompt in admitted], [[] for _ in admitted]).to(device),
            slots=int64([slot for slot, prompt in admitted for _ in prompt]),
            places=int64([place for _, prompt in admitted for place in range(len(prompt))]),
        )
    return DecodeLayout(
        cache=cache,
        input_ids=int64(ids),
        position_ids=int64(positions),
        predict_rows=int64(predict_rows),
        row_length=len(ids),
        longest=longest,
        active=_active_rows(active, prompt_lengths, int64) if active else None,
        prefill=prefill,
    )


def _active_rows(
    active: Sequence[tuple[int, int, int]], prompt_lengths: Sequence[int], int64: Callable[[Sequence[int]], Tensor]
) -> _ActiveRows:
    rows_of_slot: dict[int, list[int]] = {}
    for row, (_, slot, _) in enumerate(active):
        rows_of_slot.setdefault(slot, []).append(row)
    # Slots beyond the last one with an active candidate (prompts admitted in this pass) have no line.
    prompts = 1 + max(rows_of_slot)
    lanes = max(len(rows) for rows in rows_of_slot.values())
    grid_rows = [0] * (prompts * lanes)
    row_places = [0] * len(active)
    for slot, rows in rows_of_slot.items():
        for lane, row in enumerate(rows):
            grid_rows[slot * lanes + lane] = row
            row_places[row] = slot * lanes + lane
    stored = int64([prompt_lengths[slot] for slot in range(prompts)])
    longest_prompt = max(prompt_lengths[slot] for slot in range(prompts))
    own_index = int64([cached for _, _, cached in active])
    positions = [prompt_lengths[slot] + cached for _, slot, cached in active]
    longest_own = 1 + max(cached for _, _, cached in active)
    return _ActiveRows(
        prompts=prompts,
        lanes=lanes,
        rows=torch.arange(len(active), device=own_index.device),
        own_index=own_index,
        grid_rows=int64(grid_rows),
        row_places=int64(row_places),
        prompt_bias=_length_bias(stored, longest_prompt),
        own_bias=_length_bias(own_index + 1, longest_own),
        positions=int64(positions),
        longest=1 + max(positions),
    )


def _length_bias(lengths: Tensor, longest: int) -> Tensor:
    """[n] lengths -> [n, 1, longest] fp32: 0 at places below the length, -inf from there on."""
    beyond = torch.arange(longest, device=lengths.device) >= lengths[:, None]
    return torch.zeros(beyond.shape, device=lengths.device).masked_fill_(beyond, float("-inf"))[:, None, :]


def _biases(active: _ActiveRows, shared: int, window: int | None) -> tuple[Tensor, Tensor]:
    """The biases of prompts and of candidates, with -inf on what each row's window has left behind.

    With a window that is shorter than the texts the first has a line per query: [prompts, lanes * shared, longest
    prompt], as the lanes of a prompt are at different positions. shared: query heads per KV head.
    """
    if window is None or active.longest <= window:
        return active.prompt_bias, active.own_bias
    first = (active.positions - window + 1).unsqueeze(1)  # the first position that a row sees
    on_grid = first[active.grid_rows].view(active.prompts, active.lanes, 1).repeat_interleave(shared, dim=1)
    prompt_length = (active.positions - active.own_index).unsqueeze(1)
    on_own = (first - prompt_length).unsqueeze(1)

    def hide(bias: Tensor, first: Tensor) -> Tensor:
        places = torch.arange(bias.shape[-1], device=bias.device)
        return bias.masked_fill(places < first, float("-inf"))

    return hide(active.prompt_bias, on_grid), hide(active.own_bias, on_own)


def _attend_cached(
    q: Tensor, k: Tensor, v: Tensor, cache: KvCache, layer: int, active: _ActiveRows, rule: ScoreRule
) -> Tensor:
    """One query per candidate over its prompt's cache and its own, one softmax over both: [m, hq, d].

    The two parts are computed with their own maximum and merged by their sums of exponentials.
    """
    rows, query_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    shared = query_heads // kv_heads
    own_keys, own_values = cache.candidate_keys[layer], cache.candidate_values[layer]
    own_keys[active.rows, :, active.own_index] = k
    own_values[active.rows, :, active.own_index] = v

    grouped = q.reshape(rows, kv_heads, shared, head_dim)
    prompt_bias, own_bias = _biases(active, shared, rule.window)
    own_length = own_bias.shape[-1]
    own = _weigh(grouped, own_keys[:rows, :, :own_length], own_values[:rows, :, :own_length], own_bias, rule)

    lines, lanes = active.prompts, active.lanes
    grid = grouped[active.grid_rows].view(lines, lanes, kv_heads, shared, head_dim).transpose(1, 2)
    grid = grid.reshape(lines, kv_heads, lanes * shared, head_dim)
    length = prompt_bias.shape[-1]
    on_prompt = _weigh(
        grid,
        cache.prompt_keys[layer, :lines, :, :length],
        cache.prompt_values[layer, :lines, :, :length],
        prompt_bias,
        rule,
    )

    def to_rows(part: Tensor) -> Tensor:
        by_lane = part.view(lines, kv_heads, lanes, shared, -1).transpose(1, 2).flatten(0, 1)
        return by_lane[active.row_places]

    sums, maxima, weights = (to_rows(part) for part in on_prompt)
    own_sums, own_maxima, own_weights = own
    top = torch.maximum(maxima, own_maxima)
    share, own_share = torch.exp(maxima - top), torch.exp(own_maxima - top)
    merged = (sums * share + own_sums * own_share) / (weights * share + own_weights * own_share)
    return merged.reshape(rows, query_heads, head_dim).to(q.dtype)


def _weigh(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, rule: ScoreRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Unnormalised attention of [n, h, r, d] queries over [n, h, l, d] keys and values; bias [n, 1 or r, l].

    Returns fp32 sum_j e_j v_j [n, h, r, d], the maximum score [n, h, r, 1] and sum_j e_j [n, h, r, 1], where
    e_j = exp(score_j - maximum). A query that sees no key has the smallest number as its maximum and sums of 0.
    """
    lines, heads = queries.shape[:2]
    scores = product(queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2))
    scores = soft_cap_(scores.view(lines, heads, *scores.shape[1:]).mul_(rule.scale), rule.softcap).add_(bias[:, None])
    maxima = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    exponentials = scores.sub_(maxima).exp_()
    weights = exponentials.sum(-1, keepdim=True)
    sums = product(exponentials.flatten(0, 1).to(values.dtype), values.flatten(0, 1))
    return sums.view(queries.shape), maxima, weights


def _attend_prompts(
    q: Tensor, k: Tensor, v: Tensor, cache: KvCache, layer: int, prefill: _PrefillRows, rule: ScoreRule
) -> Tensor:
    """Causal attention inside each admitted prompt, and its keys and values into the cache: [p, hq, d]."""
    cache.prompt_keys[layer][prefill.slots, :, prefill.places] = k
    cache.prompt_values[layer][prefill.slots, :, prefill.places] = v
    prompts = segment_pass(prefill.prompts)
    return kernels_for(q, prompts, rule).forward(QKV(q, k, v), prompts, rule).output
