"""Cached attention against a dense softmax over each candidate's whole sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from exo_megatron.models.attention.cache import ActiveTokens, KvCache, place_active
from exo_megatron.models.attention.passes import ScoreRule
from exo_megatron.models.layouts.decode import build_decode_layout

HEADS, KV_HEADS, DIM = 4, 2, 8
LAYERS = (3, 4)  # a later pipeline stage's numbers
PLAIN = ScoreRule(scale=0.3)


def make_cache(dtype: torch.dtype = torch.float32) -> KvCache:
    return KvCache(
        layer_numbers=LAYERS,
        prompt_slots=3,
        prompt_length=9,
        candidate_slots=6,
        candidate_length=5,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=dtype,
        device=torch.device("cpu"),
    )


class Sequences:
    """Keys and values of every token fed so far, by sequence; the expected result of one query."""

    def __init__(self, seed: int, dtype: torch.dtype, rule: ScoreRule = PLAIN) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.rule = rule
        self.stored: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def tokens(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        def draw(heads: int) -> Tensor:
            return (torch.randn(count, heads, DIM, generator=self.generator) * 2).to(self.dtype)

        return draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)

    def expected(self, query: Tensor, keys: list[tuple[Tensor, Tensor]]) -> Tensor:
        keys = keys[-self.rule.window :] if self.rule.window is not None else keys
        k = torch.stack([key for key, _ in keys]).double()
        v = torch.stack([value for _, value in keys]).double()
        out = []
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            scores = k[:, kv] @ query[head].double() * self.rule.scale
            if self.rule.softcap is not None:
                scores = self.rule.softcap * torch.tanh(scores / self.rule.softcap)
            out.append(scores.softmax(0) @ v[:, kv])
        return torch.stack(out)


def run(
    cache: KvCache,
    truth: Sequences,
    plan: list[tuple[str, str]],
    prompts: dict[str, int],
    admitted: list[tuple[str, int]],
    multiple: int,
) -> None:
    """One pass, compared. plan: candidate and prompt name per slot; prompts: name -> slot; admitted: name, length."""
    lengths = {name: len(truth.stored.get(name, ())) for name in prompts} | dict(admitted)
    by_slot = sorted(prompts, key=prompts.__getitem__)
    layout = build_decode_layout(
        cache,
        active=[(5, prompts[prompt], len(truth.stored.get(name, ()))) for name, prompt in plan],
        prompt_lengths=[lengths[name] for name in by_slot],
        admitted=[(prompts[name], tuple(range(length))) for name, length in admitted],
        multiple=multiple,
        device=torch.device("cpu"),
    )
    total = len(plan) + sum(length for _, length in admitted)
    assert layout.num_tokens % multiple == 0 and layout.num_tokens - total < multiple
    positions = [lengths[prompt] + len(truth.stored.get(name, ())) for name, prompt in plan]
    for _, length in admitted:
        positions += range(length)
    assert layout.position_ids[:total].tolist() == positions
    # Another layer of the same pass has a cache of its own.
    layout.attend(*truth.tokens(layout.num_tokens), layer_number=LAYERS[1], rule=truth.rule)
    query, key, value = truth.tokens(layout.num_tokens)
    result = layout.attend(query, key, value, layer_number=LAYERS[0], rule=truth.rule)
    assert result.shape == (layout.num_tokens, HEADS, DIM) and result.dtype == truth.dtype

    owners: list[tuple[str, str | None]] = list(plan)
    owners += [(name, None) for name, length in admitted for _ in range(length)]
    expected = []
    for index, (name, prompt) in enumerate(owners):
        own = truth.stored.setdefault(name, [])
        own.append((key[index], value[index]))
        expected.append(truth.expected(query[index], truth.stored[prompt] + own if prompt else own))
    tolerance = 2e-6 if truth.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(result[:total].double(), torch.stack(expected), atol=tolerance, rtol=tolerance)
    assert not result[total:].any()


@pytest.mark.parametrize(
    "rule", [PLAIN, ScoreRule(0.3, 2.0, None), *(ScoreRule(0.3, None, w) for w in (1, 2, 3, 5, 9))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("multiple", [1, 4])
def test_prefill_decode_moves_and_reused_slots(dtype: torch.dtype, multiple: int, rule: ScoreRule) -> None:
    """Windows: of candidates at different places, some shorter than what they have generated, some into the prompt."""
    cache, truth = make_cache(dtype), Sequences(0, dtype, rule)
    run(cache, truth, [], {"A": 0, "B": 1}, [("A", 4), ("B", 9)], multiple)
    ab = [("a0", "A"), ("b0", "B"), ("a1", "A"), ("b1", "B"), ("a2", "A")]
    run(cache, truth, ab, {"A": 0, "B": 1}, [], multiple)
    run(cache, truth, ab, {"A": 0, "B": 1, "C": 2}, [("C", 1)], multiple)
    # b0 and all of A's candidates but a2 leave; a2 moves to slot 1, B's last one to slot 0, C's arrive behind.
    cache.move_candidates([(4, 1), (3, 0)])
    plan = [("b1", "B"), ("a2", "A"), ("c0", "C"), ("c1", "C")]
    run(cache, truth, plan, {"A": 0, "B": 1, "C": 2}, [], multiple)
    # A leaves: C moves to its slot, D takes C's in the same pass.
    cache.move_prompts([(2, 0)])
    cache.move_candidates([(3, 1)])
    plan = [("b1", "B"), ("c1", "C"), ("c0", "C")]
    run(cache, truth, plan, {"C": 0, "B": 1, "D": 2}, [("D", 6)], multiple)
    run(cache, truth, [*plan, ("d0", "D")], {"C": 0, "B": 1, "D": 2}, [], multiple)


@pytest.mark.parametrize("rule", [PLAIN, ScoreRule(0.3, 2.0, None), ScoreRule(0.3, None, 4)])
def test_candidates_in_the_order_of_their_prompts(rule: ScoreRule) -> None:
    """As many of each prompt, at different places: nothing is gathered then."""
    cache, truth = make_cache(), Sequences(2, torch.float32, rule)
    run(cache, truth, [], {"A": 0, "B": 1}, [("A", 4), ("B", 7)], 1)
    run(cache, truth, [("a0", "A"), ("a1", "A")], {"A": 0, "B": 1}, [], 1)
    in_order = [("a0", "A"), ("a1", "A"), ("b0", "B"), ("b1", "B")]
    run(cache, truth, in_order, {"A": 0, "B": 1}, [], 1)
    run(cache, truth, in_order, {"A": 0, "B": 1, "C": 2}, [("C", 5)], 2)


def test_only_candidates_out_of_order_are_gathered() -> None:
    def placed(slots: list[int]) -> ActiveTokens:
        active = [(1, slot, 0) for slot in slots]
        return place_active(make_cache(), active, [4, 2, 3], torch.device("cpu"))

    assert placed([0, 0, 1, 1]).grid_index is None and placed([0, 1, 2]).grid_places is None
    for slots in ([0, 1, 0, 1], [0, 0, 1], [1, 1], [1, 0]):
        assert placed(slots).grid_index is not None and placed(slots).grid_places is not None
    tokens = torch.arange(4.0).view(4, 1, 1, 1)
    for slots in ([0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 2, 1]):
        assert torch.equal(placed(slots).from_grid(placed(slots).on_grid(tokens)), tokens)


def test_layers_with_equal_windows_share_a_bias() -> None:
    active = place_active(make_cache(), [(1, 0, 0), (2, 0, 3)], [4], torch.device("cpu"))
    assert active.longest == 8
    assert active.bias(5) is active.bias(5) and active.bias(5) is not active.bias(None)
    assert active.bias(8) is active.bias(None)  # nothing is longer


def test_padding_and_stale_slots_do_not_disturb_others() -> None:
    """The same tokens with garbage beyond every length and in every unused slot give the same bits."""
    results = []
    for garbage in (0.0, 100.0):
        cache, truth = make_cache(), Sequences(1, torch.float32)
        for tensor in (cache.prompt_keys, cache.prompt_values, cache.candidate_keys, cache.candidate_values):
            tensor.fill_(garbage)
        prompt = build_decode_layout(
            cache, active=[], prompt_lengths=[3], admitted=[(0, (5, 6, 7))], multiple=2, device=torch.device("cpu")
        )
        prompt.attend(*truth.tokens(4), layer_number=3, rule=PLAIN)
        layout = build_decode_layout(
            cache,
            active=[(1, 0, 0), (2, 0, 0), (3, 0, 0)],
            prompt_lengths=[3],
            admitted=[],
            multiple=2,
            device=torch.device("cpu"),
        )
        results.append(layout.attend(*truth.tokens(4), layer_number=3, rule=PLAIN))
    assert torch.equal(results[0], results[1])


def test_predicting_tokens() -> None:
    layout = build_decode_layout(
        make_cache(),
        active=[(7, 1, 0), (8, 0, 2)],
        prompt_lengths=[4, 2, 3, 1],
        admitted=[(2, (9, 10, 11)), (3, (12,))],
        multiple=4,
        device=torch.device("cpu"),
    )
    assert layout.input_ids.tolist() == [7, 8, 9, 10, 11, 12, 0, 0]
    assert layout.position_ids.tolist() == [2, 6, 0, 1, 2, 0, 0, 0]
    assert layout.predict_index.tolist() == [0, 1, 4, 5]
    assert layout.active is not None and layout.active.longest == 7
