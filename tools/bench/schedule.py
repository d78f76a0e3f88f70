"""Simulated duration of a pipeline step for micro-batches of given durations: the 1F1B schedule,
event by event.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Durations:
    """Durations (in any unit) of the forward and backward pass of one micro-batch on each
    pipeline stage.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]


@dataclass(frozen=True)
class _Pass:
    """A forward or backward pass of a micro-batch."""

    is_forward: bool
    index: int


def makespan(batches: Sequence[Durations]) -> float:
    """Compute the time at which the last pipeline stage has finished all micro-batches, in the
    order given.

    Each pipeline stage does its passes in the order of `_order`; a forward pass waits for the stage
    before, a backward pass for the stage after. Transfers take no time and never block the sender.
    """
    stages = len(batches[0].forward)
    orders = [_order(stage, stages, len(batches)) for stage in range(stages)]
    clock, done = [0.0] * stages, [0] * stages
    finished: dict[tuple[int, _Pass], float] = {}
    while any(done[stage] < len(orders[stage]) for stage in range(stages)):
        for stage, order in enumerate(orders):
            while done[stage] < len(order):
                work = order[done[stage]]
                source = stage - 1 if work.is_forward else stage + 1
                ready = finished.get((source, work)) if 0 <= source < stages else 0.0
                if ready is None:
                    break
                batch = batches[work.index]
                takes = batch.forward[stage] if work.is_forward else batch.backward[stage]
                clock[stage] = finished[stage, work] = max(clock[stage], ready) + takes
                done[stage] += 1
    return max(clock)


def _order(stage: int, stages: int, count: int) -> list[_Pass]:
    """List the passes of a pipeline stage under 1F1B.

    First as many forward passes as there are stages behind it, then one forward and one backward in
    turn, then the rest.
    """
    ahead = min(stages - 1 - stage, count)
    order = [_Pass(True, i) for i in range(ahead)]
    for i in range(count - ahead):
        order += [_Pass(True, i + ahead), _Pass(False, i)]
    return order + [_Pass(False, i) for i in range(count - ahead, count)]
