"""The way of tokens to their experts and back: order, exchange between the ranks that share experts.

Every token has k routes, one to each of its experts. Routes are put in the order of their experts;
a rank sends each other rank the routes to that rank's experts, and gets the results back in the
same order. All sums over the routes of a token are made in the order of its choices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import all_to_all
from torch import Tensor


@dataclass(frozen=True)
class Routes:
    """The routes of this rank's N tokens, k each, in the order of their experts.

    Attributes:
        order: [N * k] int64, for every route in order its place in the choices [N, k].
        places: [N * k] int64, for every choice its place in order.
        tokens: [N * k] int64, for every route in order its token.
        per_token: k.
        sent: numbers of routes to each rank of the expert group.
        arriving: numbers of routes from each rank of the expert group to each of this rank's experts.
        ends: [experts of this rank] int32, on the device: where the routes of each expert end among
            those that arrive, expert after expert.
    """

    order: Tensor
    places: Tensor
    tokens: Tensor
    per_token: int
    sent: list[int]
    arriving: list[list[int]]
    ends: Tensor

    @property
    def received(self) -> list[int]:
        """Numbers of routes from each rank of the expert group."""
        return [sum(of_experts) for of_experts in self.arriving]

    def order_of(self, values: Tensor) -> Tensor:
        """Put values [N * k] of the choices in the order of the routes."""
        apply: Callable[..., Tensor] = _Permuted.apply
        return apply(values, self.order, self.places)


@dataclass(frozen=True)
class ExpertShare:
    """The work that this rank's experts are given: how many tokens, with which weights.

    Attributes:
        counts: numbers of tokens of each expert, on the host.
        ends: [experts of this rank] int32, where the tokens of each expert end, on the device.
        weights: [tokens] fp32, the router's.
    """

    counts: list[int]
    ends: Tensor
    weights: Tensor


class Exchange:
    """Exchange over the ranks that share experts, each of which has as many of them."""

    def __init__(self, experts: int, group: dist.ProcessGroup) -> None:
        """Take the number of all experts and the group over which they are dealt, in rank order."""
        self.group = group
        self.ranks, self.rank = group.size(), group.rank()
        self.experts = experts
        self.own = experts // self.ranks

    def routes(self, choices: Tensor) -> Routes:
        """Order the routes of tokens by their choices [N, k] of experts.

        One all-gather of the numbers of routes where there are several ranks. The host waits for
        these numbers, once.
        """
        ordered, order = choices.reshape(-1).sort(stable=True)
        numbers = torch.arange(self.experts, device=choices.device)
        ends = self._of_all_ranks(torch.searchsorted(ordered, numbers, right=True, out_int32=True))
        table = [_differences(of_rank) for of_rank in _read(ends)]
        first = self.rank * self.own
        return Routes(
            order=order,
            places=torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)),
            tokens=order // choices.shape[1],
            per_token=choices.shape[1],
            sent=[sum(table[self.rank][at : at + self.own]) for at in range(0, self.experts, self.own)],
            arriving=[of_rank[first : first + self.own] for of_rank in table],
            ends=self._own_ends(ends),
        )

    def forth(self, tokens: Tensor, weights: Tensor, routes: Routes) -> tuple[Tensor, ExpertShare]:
        """Send routes in order, [N * k, H] with weights [N * k], to the ranks of their experts.

        Two all-to-alls. Returns what has arrived for this rank's experts, expert after expert.
        """
        tokens = all_to_all(self.group, tokens, routes.received, routes.sent)
        weights = all_to_all(self.group, weights, routes.received, routes.sent)
        counts = [sum(of_ranks) for of_ranks in zip(*routes.arriving, strict=True)]
        share = ExpertShare(counts, routes.ends, _regrouped(weights, routes.arriving))
        return _regrouped(tokens, routes.arriving), share

    def back(self, results: Tensor, routes: Routes) -> Tensor:
        """Send results of this rank's experts back: [N * k, H] of this rank's routes in order.

        One all-to-all.
        """
        of_experts = [list(of_ranks) for of_ranks in zip(*routes.arriving, strict=True)]
        returned: Tensor = all_to_all(self.group, _regrouped(results, of_experts), routes.sent, routes.received)
        return returned

    def _of_all_ranks(self, ends: Tensor) -> Tensor:
        """Gather [ranks, experts] int32, where the routes of each rank to each expert end."""
        if self.ranks == 1:
            return ends.unsqueeze(0)
        gathered = ends.new_empty(self.ranks * self.experts)
        dist.all_gather_into_tensor(gathered, ends, group=self.group)
        return gathered.view(self.ranks, self.experts)

    def _own_ends(self, ends: Tensor) -> Tensor:
        """Compute where the routes of all ranks to each of this rank's experts end; ends [ranks, experts]."""
        if self.ranks == 1:
            return ends[0]
        first = self.rank * self.own
        own = ends[:, first : first + self.own]
        return (own - ends[:, first - 1 : first] if first else own).sum(0, dtype=torch.int32)


def _differences(ends: list[int]) -> list[int]:
    return [end - before for before, end in pairwise([0, *ends])]


def _regrouped(values: Tensor, counts: list[list[int]]) -> Tensor:
    """Swap outer and inner of the groups in which values [n, ...] lie, counts[outer][inner] long."""
    if len(counts) == 1 or len(counts[0]) == 1:
        return values
    parts = values.split([count for inner in counts for count in inner])
    return torch.cat([part for inner in range(len(counts[0])) for part in parts[inner :: len(counts[0])]])


def _read(ends: Tensor) -> list[list[int]]:
    """Copy [ranks, experts] to the host, which waits for the device."""
    table: list[list[int]] = ends.tolist()
    return table


def spread(tokens: Tensor, routes: Routes) -> Tensor:
    """Copy tokens [N, H] once for each route, in order -> [N * k, H]."""
    apply: Callable[..., Tensor] = _Spread.apply
    return apply(tokens, routes)


def combine(results: Tensor, routes: Routes) -> Tensor:
    """Sum results [N * k, H] in the order of routes over those of each token -> [N, H]."""
    apply: Callable[..., Tensor] = _Combine.apply
    return apply(results, routes)


def _summed(values: Tensor, routes: Routes) -> Tensor:
    return values[routes.places].view(-1, routes.per_token, values.shape[1]).sum(1)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return tokens[routes.tokens]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.routes), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, results: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return _summed(results, routes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][ctx.routes.tokens], None


class _Permuted(torch.autograd.Function):
    """Selection of values [n, ...] by a permutation `order` [n], of which `places` is the inverse."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return values[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][ctx.saved_tensors[0]], None, None
