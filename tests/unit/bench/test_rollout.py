"""The comparison of rollouts: that it runs, counts the work exactly, and sees wrong log-probs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from torch import Tensor

from exo_megatron.config.sections import ComputeConfig, SamplingConfig
from exo_megatron.models.rotary import RotaryTable
from tools.bench import rollout
from tools.bench.models import matched_models, world
from tools.bench.rollout_floor import PlannedPass, planned_passes
from tools.bench.sides import Different


@pytest.fixture
def sides() -> Iterator[rollout.Sides]:
    with world() as runtime, matched_models(rollout.QUICK_SHAPE, runtime, ComputeConfig(precision="fp32")) as matched:
        policy = replace(matched.load(), tokenizer=rollout.endless_tokenizer(rollout.QUICK_SHAPE.vocab))
        yield rollout.Sides(policy, matched.hf, *rollout.QUICK_CASES[0])


def test_counts_by_hand(sides: rollout.Sides) -> None:
    """6 prompts of 12 in the first pass; then their 24 candidates feed a token in each of 5 passes."""
    assert sides.checked()[1] == rollout.Counts(passes=6, tokens=72 + 5 * 24, predicting=6 + 5 * 24, prefilled=72)


def test_wrong_log_probs_are_seen(sides: rollout.Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    rotate = RotaryTable.rotate

    def further(self: RotaryTable, query: Tensor, key: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        candidates = position_ids >= sides.planned()[1].lanes[0][1]
        return rotate(self, query, key, position_ids + candidates)

    assert 0 < sides.checked()[0] < rollout.TOLERANCE
    monkeypatch.setattr(RotaryTable, "rotate", further)
    with pytest.raises(Different, match="relative difference"):
        sides.checked()


def test_planned_passes_by_hand() -> None:
    """Two prompts, K=2, of which one prompt's candidates fit."""
    passes = planned_passes(
        [(1, 2, 3), (4, 5)], SamplingConfig(candidates=2, max_new_tokens=3, max_active_candidates=2)
    )
    assert passes == [
        PlannedPass(own=(), lanes=(), admitted=(3,)),
        PlannedPass(own=(1, 1), lanes=((2, 3),), admitted=()),
        PlannedPass(own=(2, 2), lanes=((2, 3),), admitted=()),
        PlannedPass(own=(), lanes=(), admitted=(2,)),
        PlannedPass(own=(1, 1), lanes=((2, 2),), admitted=()),
        PlannedPass(own=(2, 2), lanes=((2, 2),), admitted=()),
    ]
    assert [(each.tokens, each.predicting) for each in passes[:2]] == [(3, 1), (2, 2)]
