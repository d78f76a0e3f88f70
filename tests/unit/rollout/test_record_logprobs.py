"""Records of candidates and their log-probs: parted so that they fit into rows, and tied to what they belong to."""

from __future__ import annotations

import pytest

from exo_megatron.data.candidates import Candidate, CandidateRecord
from exo_megatron.data.logprob_source import LogprobSource
from exo_megatron.rollout.record_logprobs import largest_difference, split_record, with_logprobs

SOURCE = LogprobSource(fingerprint="f", temperature=0.8, precision="fp32")


def record(name: str, count: int) -> CandidateRecord:
    """Candidate k has k + 2 tokens."""
    candidates = (Candidate("", tuple(range(5, 7 + k)), True, -2.0) for k in range(count))
    return CandidateRecord(name, "the film", (1, 5, 6), tuple(candidates))


@pytest.mark.parametrize(
    ("max_tokens", "parts"),
    # A prompt of 3 tokens and candidates of 2, 3, 4 and 5: 17 in one row.
    [(17, [4]), (16, [3, 1]), (11, [2, 1, 1]), (12, [3, 1]), (8, [2, 1, 1])],
)
def test_as_few_rows_as_fit(max_tokens: int, parts: list[int]) -> None:
    given = record("a", 4)
    groups = list(split_record(given, max_tokens))
    assert [len(group.candidates) for group in groups] == parts
    assert [c for group in groups for c in group.candidates] == [c.token_ids for c in given.candidates]
    assert all(group.prompt == given.prompt_ids and group.num_tokens <= max_tokens for group in groups)


def test_log_probs_take_the_place_of_those_of_decoding() -> None:
    given = [record("a", 2), record("b", 1)]
    first, second = with_logprobs(given, [(-2.25, -2.0), (-1.0,)], SOURCE)
    assert first.logprobs == (-2.25, -2.0) and second.logprobs == (-1.0,)
    assert first.logprob_source == second.logprob_source == SOURCE
    assert [c.logprob_digest for c in first.candidates] == [
        SOURCE.digest((1, 5, 6), (5, 6)),
        SOURCE.digest((1, 5, 6), (5, 6, 7)),
    ]
    # The last one is off by 1 nat over its 2 tokens, the first one by 0.25.
    assert largest_difference(given, [first, second]) == 0.5
