"""Checks of attention over candidate groups and of log-probs, against plain arithmetic in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from exo_megatron.config.sections import ParallelConfig
from exo_megatron.data.groups import Group
from exo_megatron.data.packing import make_microbatch
from exo_megatron.diagnosis.checks import Figure, Outcome, judge
from exo_megatron.diagnosis.site import FP32_LIMIT, Site, relative_error
from exo_megatron.diagnosis.small_models import draw_groups
from exo_megatron.diagnosis.work import Lengths
from exo_megatron.logprobs.softmax import VocabShard, plan_tiles
from exo_megatron.logprobs.vocab_parallel import sharded_logprobs
from exo_megatron.models.attention.kernels import kernels_for
from exo_megatron.models.attention.passes import QKV, ScoreRule
from exo_megatron.models.layouts.groups import GroupLayout
from exo_megatron.parallel.topology import Topology, model_parallel

HALF_LIMIT = 1e-2
"""Largest relative error (L2) of results that are rounded to bf16 a few times."""
LOGPROB_LIMIT = 1e-4
"""Nats: the error of a log-prob in fp32, whose operands are bf16."""
QUERY_HEADS, KEY_HEADS = 4, 2
TEMPERATURE = 0.8
LOGITS_MEMORY = {"kept": 1024.0, "recomputed": 0.0}
"""Values of compute.logits_memory_mib with which a backward pass keeps all logits or none."""


def check_merge(site: Site, dtype: torch.dtype, *, lengths: Sequence[Lengths], head_dim: int) -> Outcome:
    """Compare the merged passes and their gradients with one softmax per candidate. Local."""
    layout = make_microbatch(draw_groups(lengths, vocab=2), multiple=1).layout
    generator = torch.Generator().manual_seed(2)
    query, key, value, upstream = (
        torch.randn(layout.num_tokens, heads, head_dim, generator=generator).to(dtype)
        for heads in (QUERY_HEADS, KEY_HEADS, KEY_HEADS, QUERY_HEADS)
    )
    rule, on_device = ScoreRule(head_dim**-0.5), layout.to(site.device)
    ours = [each.to(site.device).requires_grad_() for each in (query, key, value)]
    output = on_device.attend(*ours, layer_number=1, rule=rule)
    found = (output, *torch.autograd.grad(output, ours, upstream.to(site.device)))
    plain = QKV(*(each.detach().double().requires_grad_() for each in (query, key, value)))
    wanted = _plain_attention(plain, layout, rule)
    exact = (wanted, *torch.autograd.grad(wanted, plain, upstream.double()))
    limit = HALF_LIMIT if dtype == torch.bfloat16 else FP32_LIMIT
    names = ("output", "query", "key", "value")
    errors = [Figure(name, relative_error(*pair), limit) for name, *pair in zip(names, found, exact, strict=True)]
    kernels = type(kernels_for(ours[0], on_device.segment_pass(), rule)).__name__
    return judge(errors, note=kernels)


def _plain_attention(inputs: QKV, layout: GroupLayout, rule: ScoreRule) -> Tensor:
    """Attend [S, heads, d] by a matrix of scores for every prompt and for every candidate behind it."""
    query, key, value = inputs
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    parts = []
    for group in layout.groups:
        prompt = torch.arange(group.start, group.candidates_start)
        parts.append(_causal(query[prompt], key[prompt], value[prompt], rule))
        start = group.candidates_start
        for length in group.candidate_lengths:
            own = torch.arange(start, start + length)
            text = torch.cat((prompt, own))
            parts.append(_causal(query[own], key[text], value[text], rule))
            start += length
    return torch.cat(parts)


def _causal(query: Tensor, key: Tensor, value: Tensor, rule: ScoreRule) -> Tensor:
    """Attend from the last tokens of a text: query [q, heads, d], key and value [k, heads, d]."""
    scores = torch.einsum("qhd,khd->hqk", query, key) * rule.scale
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + key.shape[0] - query.shape[0])
    return torch.einsum("hqk,khd->qhd", torch.softmax(scores.masked_fill(later, float("-inf")), dim=-1), value)


def check_logprobs(site: Site, parallel: ParallelConfig, *, hidden_size: int, vocab: int) -> Outcome:
    """Compare log-probs of bf16 hidden states and their gradients, with logits kept and recomputed.

    Collective over the tensor group.
    """
    layout = make_microbatch(_within(site.dense.groups, vocab), multiple=1).layout
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(layout.predict_index.shape[0], hidden_size, generator=generator).bfloat16()
    weight = (torch.randn(vocab, hidden_size, generator=generator) * (3 / hidden_size**0.5)).bfloat16()
    upstream = torch.randn(layout.token_target.shape[0], generator=generator)
    plain = [each.double().requires_grad_() for each in (hidden, weight)]
    lines = torch.log_softmax(plain[0] @ plain[1].t() / TEMPERATURE, dim=-1)
    wanted = lines[layout.token_predictor, layout.token_target]
    exact = torch.autograd.grad(wanted, plain, upstream.double())
    figures = []
    with model_parallel(site.runtime, parallel, seed=0) as topology:
        own = slice(
            *(vocab * rank // topology.tensor_size for rank in (topology.tensor_rank, topology.tensor_rank + 1))
        )
        for name, memory in LOGITS_MEMORY.items():
            found, gradients = _sharded(topology, layout, hidden, weight[own], upstream, memory)
            figures.append(Figure(name, float((found.cpu().double() - wanted.detach()).abs().max()), LOGPROB_LIMIT))
            figures.append(Figure("hidden", relative_error(gradients[0], exact[0]), HALF_LIMIT))
            figures.append(Figure("weight", relative_error(gradients[1], exact[1][own]), HALF_LIMIT))
    return judge(figures)


def _sharded(
    topology: Topology, layout: GroupLayout, hidden: Tensor, weight: Tensor, upstream: Tensor, memory: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute our log-probs and the gradients of hidden states and of this rank's weight."""
    device = topology.device
    inputs = (hidden.to(device).requires_grad_(), weight.to(device).requires_grad_())
    shard = VocabShard(
        topology.tensor_group, topology.tensor_rank, topology.tensor_size, weight.shape[0] * topology.tensor_size
    )
    logps = sharded_logprobs(
        *inputs,
        layout.token_predictor.to(device),
        layout.token_target.to(device),
        shard,
        temperature=TEMPERATURE,
        tiling=plan_tiles(hidden.shape[0], weight.shape[0], inputs[1], memory_mib=memory),
    )
    of_hidden, of_weight = torch.autograd.grad(logps, inputs, upstream.to(device))
    dist.all_reduce(of_hidden, group=topology.tensor_group)
    return logps.detach(), (of_hidden, of_weight)


def _within(groups: tuple[Group, ...], vocab: int) -> list[Group]:
    """Move token ids over a larger vocabulary, so that every rank's part of it is hit."""
    largest = max(token for group in groups for candidate in group.candidates for token in candidate)
    return [
        Group(group.id, group.prompt, tuple(tuple(t * (vocab // (largest + 1)) for t in y) for y in group.candidates))
        for group in groups
    ]
