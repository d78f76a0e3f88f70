"""Checks of log-probs on vocabulary shards; see test_logprobs.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from exo_megatron.logprobs.softmax import Tiling, VocabShard
from exo_megatron.logprobs.vocab_parallel import sharded_logprobs
from exo_megatron.parallel.runtime import Runtime


@dataclass(frozen=True)
class Case:
    """hidden [M, H], the whole padded weight [Vp, H], tokens, and the log-probs' gradient [N]."""

    hidden: Tensor
    weight: Tensor
    token_predictor: Tensor
    token_target: Tensor
    upstream: Tensor
    vocab_size: int
    temperature: float
    softcap: float | None = None


def logprobs_and_gradients(
    runtime: Runtime, *, case: Case, tiling: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Of this rank: log-probs, its part of the gradient of hidden, that of its shard; whether inputs are untouched."""
    size = case.weight.shape[0] // runtime.world_size
    own = case.weight[runtime.rank * size :][:size].clone()
    hidden, weight = case.hidden.clone().requires_grad_(), own.clone().requires_grad_()
    logps = sharded_logprobs(
        hidden,
        weight,
        case.token_predictor,
        case.token_target,
        VocabShard(dist.group.WORLD, runtime.rank, runtime.world_size, case.vocab_size),
        temperature=case.temperature,
        tiling=Tiling(*tiling),
        softcap=case.softcap,
    )
    logps.backward(case.upstream.to(logps.dtype))
    untouched = torch.equal(hidden, case.hidden) and torch.equal(weight, own)
    return logps.detach(), hidden.grad, weight.grad, untouched
