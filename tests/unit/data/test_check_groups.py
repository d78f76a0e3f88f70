"""Groups that cannot be trained on are refused by name before a model is built."""

from __future__ import annotations

from typing import Any

import pytest

from exo_megatron.config.sections import ComputeConfig, ParallelConfig
from exo_megatron.data.groups import Group
from exo_megatron.data.packing import check_groups
from exo_megatron.errors import DataError
from exo_megatron.models.spec import ModelSpec, Rotary
from tests.unit.data.loader import Loader, pair

SPEC = ModelSpec(
    family="llama",
    layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab_size=101,
    max_positions=8,
    norm_epsilon=1e-5,
    rotary=Rotary(base=10000.0, dim=16),
)
FITS = Group("fits", (3, 4, 5), ((6, 7, 8, 9, 2), (6, 2)))  # 8 positions, 10 tokens


def check(groups: list[Group], max_tokens: int, **parallel: Any) -> None:
    compute = ComputeConfig(max_tokens_per_microbatch=max_tokens)
    check_groups(groups, SPEC, compute, ParallelConfig(**parallel))


def test_a_group_at_both_limits_passes() -> None:
    check([FITS], 10)


def test_too_many_positions() -> None:
    """The longest candidate counts, not their sum."""
    long = Group("long", (3, 4, 5), ((6, 2), (6, 7, 8, 9, 4, 2)))
    with pytest.raises(DataError, match=r"group 'long'.* 9 positions.* 8"):
        check([FITS, long], 100)


def test_the_record_of_a_stored_group_is_named(loader: Loader) -> None:
    groups = loader.groups([pair("a", chosen=" good", rejected=" bad"), pair("b")])
    place = r"data\.jsonl:2: group 'b': prompt and candidate need \d+ positions"
    with pytest.raises(DataError, match=place):
        check_groups(groups, SPEC.model_copy(update={"max_positions": 5}), ComputeConfig(), ParallelConfig())


def test_prompt_and_one_candidate_must_fit_into_a_micro_batch() -> None:
    """The group may not: it is trained on in parts. One candidate cannot be split."""
    check([FITS], 8)
    with pytest.raises(DataError, match=r"'fits'.* 3 tokens .* 5 of .*at most 7.*max_tokens_per_microbatch = 7"):
        check([FITS], 7)
    with pytest.raises(DataError, match=r"'demonstration'.*at most 7"):
        check([Group("demonstration", (3, 4, 5), ((6, 7, 8, 9, 2),))], 7)


def test_rows_are_padded_under_sequence_parallelism() -> None:
    """8 tokens fit into 9, but not into the multiple of 3 below 8."""
    check([FITS], 9, tensor=3)
    check([FITS], 8, tensor=3, sequence=False)
    with pytest.raises(DataError, match=r"'fits'.*at most 6"):
        check([FITS], 8, tensor=3)
