"""Log-probs of given candidates: the forward pass of training, without the backward."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from exo_megatron.config.sections import ComputeConfig
from exo_megatron.data.groups import Group
from exo_megatron.data.oversized import rows_of_group
from exo_megatron.data.packing import make_microbatch, plan_microbatches
from exo_megatron.logprobs.sequence import sequence_logprobs, token_logprobs
from exo_megatron.models.policy import PolicyModel
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.topology import Topology
from exo_megatron.rollout.pipeline import forward_only, run_stage
from exo_megatron.utils.progress import Progress


def candidate_logprobs(
    model: PolicyModel,
    spec: ModelSpec,
    topology: Topology,
    groups: Sequence[Group],
    compute: ComputeConfig,
    *,
    temperature: float,
    progress: Progress | None = None,
) -> list[tuple[float, ...]]:
    """log pi(y_k | x) under softmax(logits / temperature) of every candidate of every group, in nats, fp64 sums.

    Collective over the world; every rank passes all groups and gets all results, in group order. Packed rows of at
    most compute.max_tokens_per_microbatch tokens are split over the data ranks; pipeline stages work on consecutive
    rows at the same time; a group that exceeds a row is scored in several, each with its prompt. Ends with one
    all-reduce over the data group and one broadcast over the pipeline group. progress: counts groups, those of the
    other data ranks too. Raises DataError where a prompt and one candidate exceed a row.
    """
    max_tokens, multiple = compute.max_tokens_per_microbatch, topology.row_multiple
    split = [list(rows_of_group(group, max_tokens=max_tokens, multiple=multiple)) for group in groups]
    pieces = [piece for parts in split for piece in parts]
    completes = [place == len(parts) - 1 for parts in split for place in range(len(parts))]
    plan = plan_microbatches(
        pieces,
        data_size=topology.data_size,
        max_tokens=max_tokens,
        multiple=multiple,
        hidden_size=spec.hidden_size,
    )
    starts = [0, *accumulate(len(piece.candidates) for piece in pieces)]
    totals = torch.zeros(starts[-1], dtype=torch.float64, device=topology.device)
    with forward_only(model):
        for step, indices in enumerate(plan[topology.data_rank]):
            if indices or topology.shares_experts:  # equally many rows on every data rank, some of padding only
                sums = _row_logprobs(model, spec, topology, [pieces[i] for i in indices], compute, temperature)
                places = [place for i in indices for place in range(starts[i], starts[i + 1])]
                if sums is not None:
                    totals[torch.tensor(places).to(topology.device, non_blocking=True)] = sums
            if progress is not None:
                # Rows cost about the same, so the other ranks are as far.
                progress.advance(sum(completes[i] for rows in plan for i in rows[step]))
    if topology.is_last_stage and topology.data_size > 1:
        dist.all_reduce(totals, group=topology.data_group)
    if topology.pipeline_size > 1:
        dist.broadcast(totals, src=topology.last_stage_rank, group=topology.pipeline_group)
    values = totals.tolist()
    ends = accumulate((len(group.candidates) for group in groups), initial=0)
    return [tuple(values[start:stop]) for start, stop in pairwise(ends)]


def _row_logprobs(
    model: PolicyModel,
    spec: ModelSpec,
    topology: Topology,
    groups: Sequence[Group],
    compute: ComputeConfig,
    temperature: float,
) -> Tensor | None:
    """[C] fp64 log-probs of the candidates of one packed row on the last pipeline stage, None on the others."""
    layout = make_microbatch(groups, multiple=topology.row_multiple).layout.to(topology.device)
    hidden = run_stage(model, layout, topology)
    if hidden is None:
        return None
    tokens = token_logprobs(
        hidden,
        model.output_weight(),
        layout,
        spec=spec,
        temperature=temperature,
        memory_mib=compute.logits_memory_mib,
        topology=topology,
    )
    return sequence_logprobs(tokens, layout)
