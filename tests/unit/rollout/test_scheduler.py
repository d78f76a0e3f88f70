"""Continuous batching without a model: a fake one whose candidates have known lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from exo_megatron.rollout.scheduler import Pass, Scheduler

EOS = 2


def ended(tokens: Sequence[int]) -> bool:
    return tokens[-1] == EOS


class FakeCache:
    """Follows slot moves as the KV cache does and checks that every row finds its own history."""

    def __init__(self, prompt_slots: int, candidate_slots: int) -> None:
        self.prompts: list[int | None] = [None] * prompt_slots
        self.candidates: list[tuple[int, int, int] | None] = [None] * candidate_slots

    def run(self, work: Pass) -> None:
        for source, destination in work.candidate_moves:
            self.candidates[destination] = self.candidates[source]
        for source, destination in work.prompt_moves:
            self.prompts[destination] = self.prompts[source]
        assert [prompt.slot for prompt in work.prompts] == list(range(len(work.prompts)))
        for prompt in work.admitted:
            self.prompts[prompt.slot] = prompt.index
        for slot, candidate in enumerate(work.active):
            assert self.prompts[candidate.prompt.slot] == candidate.prompt.index
            cached = len(candidate.tokens) - 1
            if cached:
                assert self.candidates[slot] == (candidate.prompt.index, candidate.number, cached)
            self.candidates[slot] = (candidate.prompt.index, candidate.number, cached + 1)


def token(prompt: int, number: int, step: int, length: int) -> int:
    return EOS if step == length - 1 else 3 + (prompt * 31 + number * 7 + step) % 50


def simulate(
    prompts: list[tuple[int, ...]], lengths: dict[tuple[int, int], int], *, max_new: int, max_active: int, prefill: int
) -> tuple[dict[tuple[int, int], tuple[list[int], bool, float]], list[Pass]]:
    candidates = 1 + max(number for _, number in lengths)
    scheduler = Scheduler(
        prompts,
        candidates=candidates,
        max_new_tokens=max_new,
        max_active=max_active,
        max_prefill_tokens=prefill,
        ends=ended,
    )
    cache = FakeCache(scheduler.prompt_slots, max_active)
    results = {}
    passes = []
    while (work := scheduler.next_pass()) is not None:
        cache.run(work)
        passes.append(work)
        assert len(work.active) <= max_active
        tokens = [
            token(c.prompt.index, c.number, len(c.tokens), lengths[c.prompt.index, c.number]) for c, _ in work.draws
        ]
        for done in scheduler.accept(tokens, [-0.5] * len(tokens)):
            assert (done.prompt.index, done.number) not in results
            results[done.prompt.index, done.number] = (done.tokens, done.finished, done.logprob)
    return results, passes


LENGTHS = {(p, k): 1 + (p * p * 13 + k * k * 5 + p * k) % 17 for p in range(11) for k in range(3)}
PROMPTS = [tuple(range(3, 4 + (p * 5) % 9)) for p in range(11)]


@pytest.mark.parametrize("max_active", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("prefill", [1, 12, 1000])
@pytest.mark.parametrize("max_new", [1, 9, 40])
def test_every_candidate_is_decoded_to_its_end(max_active: int, prefill: int, max_new: int) -> None:
    results, passes = simulate(PROMPTS, LENGTHS, max_new=max_new, max_active=max_active, prefill=prefill)
    assert results.keys() == LENGTHS.keys()
    for (prompt, number), (tokens, finished, logprob) in results.items():
        length = LENGTHS[prompt, number]
        assert tokens == [token(prompt, number, step, length) for step in range(min(length, max_new))]
        assert finished == (length <= max_new)
        assert logprob == -0.5 * len(tokens)
    assert Counter(prompt.index for work in passes for prompt in work.admitted) == Counter(range(11))
    for work in passes:
        assert len(work.admitted) <= 1 or sum(len(prompt.tokens) for prompt in work.admitted) <= prefill


def test_freed_slots_are_used_in_the_next_pass() -> None:
    _, passes = simulate(PROMPTS, LENGTHS, max_new=40, max_active=6, prefill=1000)
    tokens = sum(len(work.active) for work in passes)
    assert tokens == sum(length - 1 for length in LENGTHS.values())
    # While prompts wait, a slot stands empty only in the pass that prefills its next candidate.
    last = max(i for i, work in enumerate(passes) if work.admitted)
    for work in passes[:last]:
        assert work.admitted or len(work.active) == 6 or len(work.prompts) == 4


def test_slots_in_use_are_the_first_ones() -> None:
    _, passes = simulate(PROMPTS, LENGTHS, max_new=40, max_active=5, prefill=1000)
    assert any(work.candidate_moves for work in passes)
    assert any(work.prompt_moves for work in passes)


def test_no_prompts() -> None:
    scheduler = Scheduler([], candidates=4, max_new_tokens=3, max_active=8, max_prefill_tokens=9, ends=ended)
    assert scheduler.next_pass() is None
