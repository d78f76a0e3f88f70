"""Prompts that leave no room for their candidates, in whichever table they stand."""

from __future__ import annotations

import pytest

from exo_megatron.config.sections import ComputeConfig, ParallelConfig, SamplingConfig
from exo_megatron.data.prepared import Prepared, PromptTable, prompt_lengths, prompts_table
from exo_megatron.data.prompts import Prompt
from exo_megatron.errors import DataError
from exo_megatron.rollout.lengths import check_lengths, check_microbatch_length
from tests.reference.tiny_spec import TINY_SPEC

LENGTHS = (3, 6, 5, 7, 6)
SAMPLING = SamplingConfig(max_new_tokens=4)


def prompts() -> Prepared[Prompt]:
    made = [Prompt(f"p{k}", "", tuple(range(1, length + 1))) for k, length in enumerate(LENGTHS)]
    tables = [prompts_table([("", each) for each in part]) for part in ([], made[:2], [], made[2:])]
    return Prepared(tables, PromptTable, "")


def test_lengths_are_those_of_the_prompts() -> None:
    assert prompt_lengths(prompts()).tolist() == list(LENGTHS)


@pytest.mark.parametrize(("most", "named"), [(11, None), (10, "p3"), (9, "p1")])
def test_the_first_that_leaves_no_room_is_named(most: int, named: str | None) -> None:
    spec = TINY_SPEC.model_copy(update={"max_positions": most})
    compute = ComputeConfig(max_tokens_per_microbatch=most)
    checks = (
        lambda: check_lengths(prompts(), SAMPLING, spec),
        lambda: check_microbatch_length(prompts(), SAMPLING, compute, ParallelConfig()),
    )
    for check in checks:
        if named is None:
            check()
            continue
        with pytest.raises(DataError) as caught:
            check()
        assert caught.value.where == f"prompt {named!r}"
        assert f"{LENGTHS[int(named[1])]} tokens + sampling.max_new_tokens 4" in caught.value.problem
