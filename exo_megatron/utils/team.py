"""Work of the host that the processes of a world divide among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from exo_megatron.errors import DataError, ExoError

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes of a world that divide work of the host among them, such as tokenising.

    Attributes:
        rank, size: of this process in the world.
        node_rank, node_size: of this process among those of its node.
        share: gathers a small value of every process on all of them.
    """

    rank: int
    size: int
    node_rank: int
    node_size: int
    share: Callable[[Any], list[Any]]

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do work on every process and return all results in rank order; an error of any is raised on all."""
        outcome: tuple[T | None, ExoError | None]
        try:
            outcome = work(), None
        except ExoError as error:
            outcome = None, error
        outcomes = self.share(outcome)
        for _, failure in outcomes:
            if failure is not None:
                raise failure
        return [result for result, _ in outcomes]

    def on_nodes(self, work: Callable[[], T]) -> T:
        """Do work on the first process of every node. Returns the results, which are equal, on all processes.

        Raises DataError if nodes differ.
        """
        results = [each for each in self.together(lambda: [work()] if self.node_rank == 0 else []) if each]
        for other in results[1:]:
            if other != results[0]:
                raise DataError(
                    "data",
                    f"nodes of this run read different data ({results[0][0]} and {other[0]})",
                    expected="the same files, tokenizer and program on all nodes",
                    fix="copy or mount the same files everywhere",
                )
        return results[0][0]


ALONE = Team(rank=0, size=1, node_rank=0, node_size=1, share=lambda value: [value])
"""A process without others."""
