from __future__ import annotations

import pytest

from exo_megatron.data.groups import StepSampler


def sampler(
    num_groups: int = 10, groups_per_step: int = 4, epochs: int = 2, max_steps: int | None = None, seed: int = 7
) -> StepSampler:
    return StepSampler(num_groups, groups_per_step=groups_per_step, epochs=epochs, max_steps=max_steps, seed=seed)


def test_each_epoch_sees_every_group_once_in_another_order() -> None:
    steps = sampler()
    assert steps.total_steps == 6
    assert [len(steps.indices(step)) for step in range(6)] == [4, 4, 2, 4, 4, 2]
    epochs = [[i for step in range(first, first + 3) for i in steps.indices(step)] for first in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    assert list(range(10)) not in epochs


def test_a_step_depends_on_nothing_but_its_number_and_the_seed() -> None:
    straight = [sampler().indices(step) for step in range(6)]
    resumed = sampler()
    assert [resumed.indices(step) for step in (5, 0, 3)] == [straight[5], straight[0], straight[3]]
    assert [sampler(seed=8).indices(step) for step in range(6)] != straight


def test_the_order_of_a_seed_never_changes() -> None:
    """Runs resume under other versions of numpy, so the order is part of the format."""
    assert [sampler().indices(step) for step in range(3)] == [[8, 4, 1, 6], [3, 2, 7, 5], [9, 0]]


def test_max_steps_and_longer_epochs() -> None:
    assert sampler(max_steps=4).total_steps == 4
    assert sampler(max_steps=100).total_steps == 6
    assert sorted(sampler(num_groups=3, groups_per_step=8, epochs=1).indices(0)) == [0, 1, 2]


def test_epoch_counts_completed_passes() -> None:
    assert [sampler().epoch(steps) for steps in range(7)] == pytest.approx([0, 0.4, 0.8, 1, 1.4, 1.8, 2])


def test_steps_outside_the_run_are_refused() -> None:
    for step in (-1, 6):
        with pytest.raises(IndexError):
            sampler().indices(step)
    for steps in (-1, 7):
        with pytest.raises(IndexError):
            sampler().epoch(steps)
    with pytest.raises(ValueError, match="num_groups"):
        sampler(num_groups=0)


def test_large_and_negative_seeds() -> None:
    for seed in (-1, 2**63, 2**64 - 1):
        assert sorted(sampler(groups_per_step=10, seed=seed).indices(0)) == list(range(10))
