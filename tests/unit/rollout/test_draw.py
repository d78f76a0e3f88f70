"""Log-probs of records of candidates are tied to what they belong to."""

from __future__ import annotations

from exo_megatron.data.candidates import Candidate, CandidateRecord
from exo_megatron.data.logprob_source import LogprobSource
from exo_megatron.rollout.draw import largest_difference, with_logprobs

SOURCE = LogprobSource(fingerprint="f", temperature=0.8, precision="fp32")


def record(name: str, count: int) -> CandidateRecord:
    """Candidate k has k + 2 tokens."""
    candidates = (Candidate("", tuple(range(5, 7 + k)), True, -2.0) for k in range(count))
    return CandidateRecord(name, "the film", (1, 5, 6), tuple(candidates))


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
