"""The floor of a rollout: the matrix products of its passes, and one read of weights and cache.

Products: those of the linear layers (qkv, proj, fc1, fc2) and of the output layer with our weights
and as many lines as each pass has, and those of attention: q k^T and p v of the newest tokens over
their prompts' keys and values, a prompt once for all its candidates, and over the candidates' own,
up to the longest of the pass; of an admitted prompt half the square of its length. Operands and
results are contiguous, exist before and stay, and every layer has its own cache, so that its memory
is read as in a pass. Nothing is scaled, exponentiated, gathered or stored.

Read: a sum over all weights of the layers and of the output layer, and over the distinct cache:
each candidate's own keys and values and each prompt's once. The products read them, too, so this
part counts them a second time; the floor is defined with it, and the products alone are shown
beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exo_megatron.config.sections import SamplingConfig
from exo_megatron.execution.policy import Policy
from exo_megatron.rollout.native import MAX_PREFILL_TOKENS
from exo_megatron.rollout.scheduler import Pass, Scheduler

NEVER = -1
"""No token has this id: nothing ends by itself."""


@dataclass(frozen=True)
class PlannedPass:
    """One pass in numbers.

    Attributes:
        own: for each active candidate the tokens in its cache, the newest included.
        lanes: for each prompt with active candidates how many these are, and its tokens.
        admitted: tokens of each prompt that is prefilled.
    """

    own: tuple[int, ...]
    lanes: tuple[tuple[int, int], ...]
    admitted: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens through the layers."""
        return len(self.own) + sum(self.admitted)

    @property
    def predicting(self) -> int:
        """Hidden states through the output layer."""
        return len(self.own) + len(self.admitted)


def planned_passes(prompts: Sequence[tuple[int, ...]], sampling: SamplingConfig) -> list[PlannedPass]:
    """Plan the passes of a rollout in which no candidate ends by itself."""
    scheduler = Scheduler(
        prompts,
        candidates=sampling.candidates,
        max_new_tokens=sampling.max_new_tokens,
        max_active=sampling.max_active_candidates,
        max_prefill_tokens=MAX_PREFILL_TOKENS,
        ends=lambda tokens: tokens[-1] == NEVER,
    )
    passes: list[PlannedPass] = []
    while (work := scheduler.next_pass()) is not None:
        passes.append(_planned(work))
        scheduler.accept([0] * len(work.draws), [0.0] * len(work.draws))
    return passes


def _planned(work: Pass) -> PlannedPass:
    lanes: dict[int, int] = {}
    for candidate in work.active:
        lanes[candidate.prompt.slot] = lanes.get(candidate.prompt.slot, 0) + 1
    return PlannedPass(
        own=tuple(len(candidate.tokens) for candidate in work.active),
        lanes=tuple((count, len(work.prompts[slot].tokens)) for slot, count in lanes.items()),
        admitted=tuple(len(prompt.tokens) for prompt in work.admitted),
    )


class Floor:
    """The products and the reads of a rollout's passes, on the policy's own weights.

    The model is whole in this process.
    """

    def __init__(self, policy: Policy, passes: Sequence[PlannedPass]) -> None:
        """Allocate operands and results of the largest pass."""
        spec, model = policy.spec, policy.model
        self._passes = passes
        self._heads, self._kv_heads, self._head_dim = spec.heads, spec.kv_heads, spec.head_dim
        self._layers = [
            [
                part.weight.detach()
                for part in (
                    layer.self_attention.linear_qkv,
                    layer.self_attention.linear_proj,
                    layer.mlp.linear_fc1,
                    layer.mlp.linear_fc2,
                )
            ]
            for layer in model.decoder.layers
        ]
        self._output = model.output_weight().detach()
        tokens = max(each.tokens for each in passes)
        weights = [*self._layers[0], self._output]
        self._inputs = torch.randn(tokens * max(weight.shape[1] for weight in weights))
        self._results = torch.empty(tokens * max(weight.shape[0] for weight in weights))
        places = max(_cached(each) for each in passes) * self._kv_heads * self._head_dim
        self._cache = [(torch.randn(places), torch.randn(places)) for _ in self._layers]
        blocks = [block for each in passes for block in self._blocks(each)]
        self._queries = torch.randn(max(block.batch * block.queries for block in blocks) * self._head_dim)
        self._attended = torch.empty_like(self._queries)
        self._scores = torch.randn(max(block.batch * block.queries * block.keys for block in blocks))

    def products(self) -> None:
        """Run the products of all passes."""
        for each in self._passes:
            blocks = list(self._blocks(each))
            for weights, (keys, values) in zip(self._layers, self._cache, strict=True):
                for weight in weights:
                    self._linear(each.tokens, weight)
                start = 0
                for block in blocks:
                    self._attention(block, keys[start:], values[start:])
                    start += block.batch * block.keys * self._head_dim
            self._linear(each.predicting, self._output)

    def read(self) -> None:
        """Read the weights and the distinct cache of all passes."""
        for each in self._passes:
            places = (sum(each.own) + sum(length for _, length in each.lanes)) * self._kv_heads * self._head_dim
            for weights, cache in zip(self._layers, self._cache, strict=True):
                for weight in weights:
                    weight.sum()
                for part in cache:
                    part[:places].sum()
            self._output.sum()

    def _linear(self, tokens: int, weight: Tensor) -> None:
        outputs, inputs = weight.shape
        result = self._results[: tokens * outputs].view(tokens, outputs)
        torch.mm(self._inputs[: tokens * inputs].view(tokens, inputs), weight.t(), out=result)

    def _attention(self, block: _Block, keys: Tensor, values: Tensor) -> None:
        """Multiply queries with keys and weights with values, from the beginning of these."""
        cached = (block.batch, block.keys, self._head_dim)
        size = block.batch * block.keys * self._head_dim
        key, value = keys[:size].view(cached), values[:size].view(cached)
        shape = (block.batch, block.queries, self._head_dim)
        count = block.batch * block.queries * self._head_dim
        query, result = self._queries[:count].view(shape), self._attended[:count].view(shape)
        scores = self._scores[: block.batch * block.queries * block.keys].view(block.batch, block.queries, block.keys)
        torch.bmm(query, key.transpose(1, 2), out=scores)
        torch.bmm(scores, value, out=result)

    def _blocks(self, each: PlannedPass) -> Iterator[_Block]:
        """List the batches of attention products of a pass: own caches, prompts, admitted prompts."""
        shared = self._heads // self._kv_heads
        if each.own:
            yield _Block(len(each.own) * self._kv_heads, shared, max(each.own))
        for lanes, length in sorted(set(each.lanes)):
            yield _Block(each.lanes.count((lanes, length)) * self._kv_heads, lanes * shared, length)
        for length in sorted(set(each.admitted)):
            yield _Block(each.admitted.count(length) * self._kv_heads, length * shared, -(-length // 2))


@dataclass(frozen=True)
class _Block:
    """A batch of attention products of equal shape: batch x [queries, keys]."""

    batch: int
    queries: int
    keys: int


def _cached(each: PlannedPass) -> int:
    """Count the places of all blocks' keys, those of admitted prompts among them."""
    prompts = sum(length for _, length in each.lanes) + sum(each.admitted)
    return len(each.own) * max(each.own, default=0) + prompts
