"""Every index tensor of a micro-batch against a per-token construction, on random ragged groups."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest

from exo_megatron.models.layouts.groups import GroupLayout, build_layout

Ids = list[int]


@dataclass(frozen=True)
class Cell:
    """One token of the micro-batch. candidate: -1 for a prompt token. place: its index in its prompt or candidate."""

    group: int
    candidate: int
    place: int
    position: int
    token: int


def random_groups(rng: random.Random, size: int) -> tuple[list[Ids], list[list[Ids]]]:
    def ids(length: int) -> Ids:
        return [rng.randrange(1, 1000) for _ in range(length)]

    prompts = [ids(rng.randint(1, 5)) for _ in range(size)]
    candidates = [[ids(rng.choice([1, 1, 2, 3, 4])) for _ in range(rng.randint(1, 4))] for _ in range(size)]
    return prompts, candidates


def cells_of(prompts: list[Ids], candidates: list[list[Ids]]) -> list[Cell]:
    cells = []
    for g, (prompt, of_group) in enumerate(zip(prompts, candidates, strict=True)):
        cells += [Cell(g, -1, t, t, token) for t, token in enumerate(prompt)]
        for k, candidate in enumerate(of_group):
            cells += [Cell(g, k, t, len(prompt) + t, token) for t, token in enumerate(candidate)]
    return cells


def visible_pairs(layout: GroupLayout) -> set[tuple[int, int]]:
    """(query token, key token) of the two attention passes that the layout describes."""
    pairs = set()
    bounds = layout.segment_cu_seqlens.tolist()
    for start, stop in itertools.pairwise(bounds):
        pairs |= {(query, key) for query in range(start, stop) for key in range(start, query + 1)}
    queries, keys = layout.candidate_index.tolist(), layout.prompt_index.tolist()
    query_bounds, key_bounds = layout.candidates_cu_seqlens.tolist(), layout.prompts_cu_seqlens.tolist()
    for g in range(len(layout.groups)):
        second = {
            (query, key)
            for query in queries[query_bounds[g] : query_bounds[g + 1]]
            for key in keys[key_bounds[g] : key_bounds[g + 1]]
        }
        assert not pairs & second, "a pair is attended to twice"
        pairs |= second
    return pairs


def may_see(query: Cell, key: Cell) -> bool:
    if query.group != key.group:
        return False
    if key.candidate == -1:
        return query.candidate >= 0 or key.place <= query.place
    return query.candidate == key.candidate and key.place <= query.place


CASES = [(size, multiple, seed) for size in (0, 1, 2, 5) for multiple in (1, 2, 8) for seed in range(4)]


@pytest.mark.parametrize(("size", "multiple", "seed"), CASES)
def test_tokens_and_attention(size: int, multiple: int, seed: int) -> None:
    prompts, candidates = random_groups(random.Random(100 * seed + size), size)
    cells = cells_of(prompts, candidates)
    layout = build_layout(prompts, candidates, multiple=multiple)
    padding = layout.num_tokens - len(cells)
    assert layout.num_tokens % multiple == 0
    assert 0 <= padding < multiple if cells else padding == multiple
    assert layout.input_ids.tolist() == [cell.token for cell in cells] + [0] * padding
    assert layout.position_ids.tolist() == [cell.position for cell in cells] + list(range(padding))
    assert sum(layout.segment_lengths) == layout.segment_cu_seqlens[-1] == layout.num_tokens
    segments = layout.segment_pass()
    assert max(segments.query_lengths) == max(segments.key_lengths) == segments.longest == max(layout.segment_lengths)
    real = range(len(cells))
    expected = {(q, k) for q in real for k in real if may_see(cells[q], cells[k])}
    padded = range(len(cells), layout.num_tokens)
    assert visible_pairs(layout) == expected | {(q, k) for q in padded for k in padded if k <= q}


@pytest.mark.parametrize(("size", "multiple", "seed"), CASES)
def test_prediction(size: int, multiple: int, seed: int) -> None:
    prompts, candidates = random_groups(random.Random(100 * seed + size), size)
    cells = cells_of(prompts, candidates)
    layout = build_layout(prompts, candidates, multiple=multiple)
    all_candidates = [candidate for group in candidates for candidate in group]
    numbers = {key: c for c, key in enumerate((g, k) for g, group in enumerate(candidates) for k in range(len(group)))}
    starts = [sum(len(candidate) for candidate in all_candidates[:c]) for c in range(len(all_candidates) + 1)]

    def predicting_index(cell: Cell) -> int:
        """The index of the token before this one in its own sequence."""
        before = [
            index
            for index, other in enumerate(cells)
            if other.group == cell.group
            and other.candidate in (-1, cell.candidate)
            and other.position == cell.position - 1
        ]
        assert len(before) == 1
        return before[0]

    tokens = sorted(
        (predicting_index(cell), numbers[cell.group, cell.candidate], cell.place, cell.token)
        for cell in cells
        if cell.candidate >= 0
    )
    predicting = sorted({index for index, *_ in tokens})
    assert layout.predict_index.tolist() == predicting
    assert layout.token_predictor.tolist() == [predicting.index(index) for index, *_ in tokens]
    assert layout.token_candidate.tolist() == [c for _, c, _, _ in tokens]
    assert layout.token_target.tolist() == [token for *_, token in tokens]
    assert layout.token_order.tolist() == [starts[c] + place for _, c, place, _ in tokens]
    assert layout.candidate_lengths.tolist() == [len(candidate) for candidate in all_candidates]
    assert layout.group_sizes == tuple(len(group) for group in candidates)
    assert sum(layout.group_sizes) == len(all_candidates)


@pytest.mark.parametrize("seed", range(4))
def test_spans(seed: int) -> None:
    prompts, candidates = random_groups(random.Random(seed), 4)
    cells = cells_of(prompts, candidates)
    for g, span in enumerate(build_layout(prompts, candidates, multiple=4).groups):
        assert cells[span.start] == Cell(g, -1, 0, 0, prompts[g][0])
        assert cells[span.candidates_start] == Cell(g, 0, 0, len(prompts[g]), candidates[g][0][0])
        assert span.prompt_length == len(prompts[g])
        assert span.candidate_lengths == tuple(len(candidate) for candidate in candidates[g])
        assert span.candidates_total == sum(cell.group == g and cell.candidate >= 0 for cell in cells)
