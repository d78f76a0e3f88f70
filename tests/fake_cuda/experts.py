"""Answers for the numbers of tokens of every expert, by which they are sent: as equal as can be."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch import Tensor

from exo_megatron.models import expert_exchange
from exo_megatron.models.expert_exchange import Exchange, Routes


def answer_splits() -> None:
    """Put numbers in the place of those that are copied to the host, the same ones on every rank."""
    read: Callable[[Tensor], Any] = expert_exchange._read
    routes = Exchange.routes

    def answering(self: Exchange, choices: Tensor) -> Routes:
        whole, rest = divmod(choices.numel(), self.experts)

        def answer(ends: Tensor) -> list[list[int]]:
            read(ends)
            of_rank = accumulate(whole + (expert < rest) for expert in range(self.experts))
            return [list(of_rank)] * self.ranks

        vars(expert_exchange)["_read"] = answer
        return routes(self, choices)

    of_exchange: Any = Exchange
    of_exchange.routes = answering
