"""Samples of a long prompt are parted so that they fit into rows."""

from __future__ import annotations

import pytest

from exo_megatron.evaluation.samples import split_record
from tests.unit.evaluation.records import record


@pytest.mark.parametrize(
    ("max_tokens", "parts"),
    # A prompt of 3 tokens and candidates of 2, 3, 4 and 5: 17 in one row.
    [(17, [4]), (16, [3, 1]), (11, [2, 1, 1]), (12, [3, 1]), (8, [2, 1, 1])],
)
def test_as_few_rows_as_fit(max_tokens: int, parts: list[int]) -> None:
    given = record("a", [0.0] * 4)
    groups = list(split_record(given, max_tokens))
    assert [len(group.candidates) for group in groups] == parts
    assert [c for group in groups for c in group.candidates] == [c.token_ids for c in given.candidates]
    assert all(group.prompt == given.prompt_ids and group.num_tokens <= max_tokens for group in groups)
