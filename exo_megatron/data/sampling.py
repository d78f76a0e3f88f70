"""Which groups each optimizer step sees: a pure function of the step, so that resuming is asking for the next one."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


class StepSampler:
    """Shuffled epochs cut into steps of `groups_per_step` groups; the last step of an epoch may be smaller.

    num_groups: size of the data set. max_steps: stop earlier than the epochs would. Each epoch is a permutation of
    all groups keyed by (seed, epoch). Nothing is remembered between calls.
    """

    def __init__(self, num_groups: int, *, groups_per_step: int, epochs: int, max_steps: int | None, seed: int) -> None:
        if min(num_groups, groups_per_step, epochs) < 1:
            raise ValueError(f"sizes must be positive: {num_groups=}, {groups_per_step=}, {epochs=}")
        self.num_groups = num_groups
        self.groups_per_step = groups_per_step
        self.seed = seed
        self.steps_per_epoch = -(-num_groups // groups_per_step)
        steps = epochs * self.steps_per_epoch
        self.total_steps = steps if max_steps is None else min(steps, max_steps)

    def indices(self, step: int) -> list[int]:
        """Indices (0..num_groups-1) of the groups of one step, 0 <= step < total_steps."""
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of {self.total_steps}")
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.num_groups, self.seed, epoch)
        return list(order[place * self.groups_per_step : (place + 1) * self.groups_per_step])

    def epoch(self, steps: int) -> float:
        """Passes over the data that are complete after this many steps, 0 <= steps <= total_steps."""
        if not 0 <= steps <= self.total_steps:
            raise IndexError(f"{steps} of {self.total_steps} steps")
        epochs, place = divmod(steps, self.steps_per_epoch)
        return epochs + place * self.groups_per_step / self.num_groups


@lru_cache(maxsize=4)
def _epoch_order(num_groups: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of range(num_groups).

    Sorts raw Philox words: numpy promises that stream for ever, which it does not for `Generator.permutation`, and
    a run must see the same order when it resumes under another numpy.
    """
    key = np.array([seed & (2**64 - 1), epoch], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(num_groups)
    return tuple(np.argsort(words, kind="stable").tolist())
