"""What lengths mean: figures by hand, and by the planners themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exo_megatron.data.groups import Group, GroupLengths
from exo_megatron.data.length_picture import draw_lengths
from exo_megatron.data.length_report import (
    LengthLimits,
    doubling_histogram,
    quantile,
    report_groups,
    report_prompts,
)
from exo_megatron.data.packing import HIDDEN_SIZE, candidate_cost, group_cost

LIMITS = LengthLimits(prompt=100, candidate=60, microbatch=201, multiple=2, groups=2)


def lengths_of(*groups: tuple[int, list[int]]) -> GroupLengths:
    return GroupLengths.of([Group(str(i), (0,) * p, tuple((0,) * r for r in rs)) for i, (p, rs) in enumerate(groups)])


FOUR = lengths_of((100, [10, 20]), (50, [5, 5, 40]), (8, [1, 1]), (2, [60, 60]))


def line_of(lines: list[str], start: str) -> str:
    (line,) = [line for line in lines if line.strip().startswith(start)]
    return line.strip()


def test_tables() -> None:
    lines = report_groups(FOUR, LIMITS)
    assert lines[0] == "4 groups, 9 candidates (K = 2 to 3), 362 tokens"
    assert line_of(lines, "prompt ").split() == ["prompt", "2", "2", "8", "100", "100", "100", "40.0"]
    assert line_of(lines, "candidate ").split() == ["candidate", "1", "1", "10", "60", "60", "60", "22.4"]
    assert line_of(lines, "group ").split() == ["group", "10", "10", "100", "130", "130", "130", "90.5"]
    assert line_of(lines, "33-64").split() == ["33-64", "25.0%", "#" * 8, "33.3%", "#" * 10, "0.0%"]
    assert line_of(report_groups(lengths_of((1, [1]), (3, [2])), LIMITS), "2 groups").count("(K = 1)") == 1


def test_bins_end_at_powers_of_two() -> None:
    bins = doubling_histogram([np.array([2, 3, 4, 5, 8, 8]), np.array([9, 16])])
    assert [label for label, _ in bins] == ["2", "3-4", "5-8", "9-16"]
    assert np.allclose([shares for _, shares in bins], [[1 / 6, 0], [1 / 3, 0], [1 / 2, 0], [0, 1]])
    assert doubling_histogram([np.array([1, 1])]) == [("1", [1.0])]


def test_quantiles_are_lengths_that_occur() -> None:
    values = np.arange(1, 201)
    assert [quantile(values, share) for share in (0.005, 0.5, 0.99, 0.995, 1.0)] == [1, 100, 198, 199, 200]


def test_shared_prompts() -> None:
    """160 + 202 tokens instead of 200 + 150 + 16 + 4 + 202."""
    line = line_of(report_groups(FOUR, LIMITS), "shared prompts")
    assert line == "shared prompts: 362 tokens instead of 572 in one sequence per candidate (36.7% fewer)"


def test_limits() -> None:
    lines = report_groups(FOUR, LIMITS)
    assert line_of(lines, "data.max_prompt") == "data.max_prompt_tokens = 100: all prompts fit, the longest with 100"
    lines = report_groups(FOUR, replace(LIMITS, prompt=49, candidate=39))
    assert line_of(lines, "data.max_prompt").endswith(
        "longer are 2 of 4 prompts (50.00%), in records with 63.54% of all tokens"
    )
    assert line_of(lines, "data.max_completion").endswith(
        "longer are 3 of 9 candidates (33.33%), in records with 61.33% of all tokens"
    )
    hundred = lengths_of(*[(10, [10])] * 98, (20, [10]), (30, [10]))
    line = line_of(report_groups(hundred, LIMITS), "at 20:")
    assert line == "at 20: longer are 1 of 100 prompts (1.00%), in records with 1.97% of all tokens"


def test_micro_batches_of_steps() -> None:
    lines = report_groups(lengths_of(*[(50, [25, 25])] * 7), LIMITS)
    assert line_of(lines, "batch.groups") == "batch.groups = 2: 175 tokens in a step"  # 3 steps of 200, one of 100
    assert line_of(lines, "on 1 data") == "on 1 data-parallel rank: 1.0 micro-batches of a rank and step, 88% full"
    assert not [line for line in lines if line.startswith("  on 8")]
    lines = report_groups(lengths_of(*[(50, [25, 25])] * 16), replace(LIMITS, groups=16))
    assert line_of(lines, "on 1 data").endswith("8.0 micro-batches of a rank and step, 100% full")
    assert line_of(lines, "on 8 data") == "on 8 data-parallel ranks: 1.0 micro-batches of a rank and step, 100% full"


def test_groups_in_parts() -> None:
    """Parts of 2 and 1 candidates: the second passes once more without gradients, a third of its cost."""
    lines = report_groups(lengths_of((100, [50, 50, 50]), (50, [10])), LIMITS)
    large = Group("", (0,) * 100, ((0,) * 50,) * 3)
    again = candidate_cost(100, 50, HIDDEN_SIZE) / 3
    small = group_cost(Group("", (0,) * 50, ((0,) * 10,)))
    assert line_of(lines, "exceed it") == "exceed it: 1 of 2 groups (50.00%), which are trained on in parts"
    assert line_of(lines, "they cost") == (
        f"they cost {1 + again / group_cost(large):.2f} times as much for that, all groups "
        f"{1 + again / (group_cost(large) + small):.3f} times (a model 4,096 wide)"
    )
    assert line_of(lines, "on 1 data").endswith("1.0 micro-batches of a rank and step, 30% full")


def test_groups_that_training_refuses_are_in_no_step() -> None:
    too_long = [(100, [101]), (101, [1]), (5, [1, 102])]
    lines = report_groups(lengths_of(*too_long, (1, [61]), (10, [10])), replace(LIMITS, candidate=101))
    refused = "its prompt and one candidate exceed it: 1 of 5 groups (20.00%), which are refused"
    assert line_of(lines, "its prompt") == refused
    assert line_of(lines, "batch.groups") == "batch.groups = 2: 82 tokens in a step"
    last = report_groups(lengths_of((100, [101])), LIMITS)[-1]
    assert last.strip().startswith("its prompt and one candidate exceed it: 1 of 1")


def test_prompts_alone() -> None:
    lines = report_prompts(np.array([5, 7, 12]), 10)
    assert lines[0] == "3 prompts, 24 tokens"
    limit = "data.max_prompt_tokens = 10: longer are 1 of 3 prompts (33.33%), in records with 50.00% of all tokens"
    assert lines[-1] == limit


@pytest.mark.parametrize("microbatch", [200, 100_000])
def test_picture(tmp_path: Path, microbatch: int) -> None:
    from matplotlib.image import imread

    draw_lengths(FOUR, replace(LIMITS, microbatch=microbatch), tmp_path / "lengths.png")
    image = imread(tmp_path / "lengths.png")
    assert image.shape[:2] == (540, 1620)
    dashes = (np.abs(image[:, :, :3] - np.array([0xD5, 0x5E, 0x00]) / 255).sum(axis=2) < 0.02).sum(axis=0) > 100
    thirds = [bool(dashes[start : start + 540].any()) for start in (0, 540, 1080)]
    assert thirds == [True, True, microbatch == 200]
