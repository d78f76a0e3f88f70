"""Forward passes of one pipeline stage and of all, and log-probs of given candidates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from exo_megatron.data.groups import Group
from exo_megatron.data.packing import fit_candidates, make_microbatch, plan_microbatches
from exo_megatron.execution.policy import Policy
from exo_megatron.logprobs.vocab_parallel import sequence_logprobs
from exo_megatron.models.layouts.base import Layout
from exo_megatron.models.layouts.groups import build_layout
from exo_megatron.models.policy import PolicyModel
from exo_megatron.parallel.topology import Topology
from exo_megatron.utils.progress import Progress


def stage_output(model: torch.nn.Module, layout: Layout) -> Tensor:
    """Run this rank's pipeline stage over a layout on its device.

    model: a PolicyModel, which describes the output, or its data-parallel wrapper. Collectives:
    those of the layers over the tensor group.
    """
    output: Tensor = model(layout.input_ids[None], layout.position_ids[None], None, packed_seq_params=layout)
    return output


@contextmanager
def forward_only(model: PolicyModel) -> Iterator[None]:
    """Set evaluation mode without gradients in a block; the model's mode is restored at its end.

    `no_grad` and not `inference_mode`, because megatron-core keeps buffers between passes, which
    training must be able to save for its backward.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def pipeline_forward(policy: Policy, layout: Layout) -> Tensor | None:
    """Run this rank's share of one pass.

    It receives hidden states from the pipeline stage before, computes, and sends to the one after.
    Point to point over the pipeline group: hidden states [S, 1, H] ([S / t, 1, H] under sequence
    parallelism) in the parameters' dtype.

    Args:
        policy: the same on all ranks of the model-parallel group, except for their parts of the
            model.
        layout: on the device, the same on all these ranks.

    Returns:
        The last pipeline stage's output (see PolicyModel), None on the others.
    """
    if not policy.topology.is_first_stage:
        policy.model.set_input_tensor(received_hidden(policy, layout.num_tokens))
    output = stage_output(policy.model, layout)
    if policy.topology.is_last_stage:
        return output
    send_to_stage(output, 1, policy.topology)
    return None


def received_hidden(policy: Policy, num_tokens: int) -> Tensor:
    """Receive the hidden states of `num_tokens` tokens from the pipeline stage before.

    Returns [S, 1, H], or [S / t, 1, H] under sequence parallelism.
    """
    config = policy.model.config
    shape = (num_tokens // policy.topology.token_multiple, 1, config.hidden_size)
    hidden = torch.empty(shape, dtype=config.pipeline_dtype, device=policy.topology.device)
    receive_from_stage(hidden, -1, policy.topology)
    return hidden


def receive_from_stage(tensor: Tensor, step: int, topology: Topology) -> None:
    """Receive into the contiguous `tensor` from the pipeline stage before (step -1) or after
    (step 1) this one.
    """
    dist.recv(tensor, src=_neighbour(step, topology), group=topology.pipeline_group)


def send_to_stage(tensor: Tensor, step: int, topology: Topology) -> None:
    """Send to the pipeline stage before (step -1) or after (step 1) this one."""
    dist.send(tensor.contiguous(), dst=_neighbour(step, topology), group=topology.pipeline_group)


def _neighbour(step: int, topology: Topology) -> int:
    """Return the world rank of the pipeline stage that is `step` after this one."""
    return dist.get_process_group_ranks(topology.pipeline_group)[topology.pipeline_rank + step]


def announce_pass(topology: Topology) -> None:
    """Tell the model copies that share experts with this one to take part in a pass.

    See `run_idle_passes`.
    """
    _any_copy_works(topology, True)


def run_idle_passes(policy: Policy) -> None:
    """Run passes of padding until no model copy that shares experts with this one announces one.

    A pass through shared experts is collective over the copies, and their numbers of passes differ:
    each copy announces its own and then joins those of the others. Returns at once if every copy
    has experts of its own.
    """
    topology = policy.topology
    padding = build_layout([], [], multiple=topology.token_multiple).to(topology.device)
    while _any_copy_works(topology, False):
        pipeline_forward(policy, padding)


def _any_copy_works(topology: Topology, here: bool) -> bool:
    """Tell whether any of the copies that share experts has a pass to do.

    One all-reduce over the expert group.
    """
    if not topology.shares_experts:
        return here
    flag = torch.tensor(int(here), device=topology.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=topology.expert_group)
    return bool(flag.item())


def candidate_logprobs(
    policy: Policy, groups: Sequence[Group], *, temperature: float, progress: Progress | None = None
) -> list[tuple[float, ...]]:
    """Compute log pi(y_k | x) under softmax(logits / temperature) of all candidates of all groups.

    Collective over the world; every rank passes all groups and gets all results. Micro-batches are
    split over the data ranks, and pipeline stages work on consecutive ones at the same time. A
    group that exceeds a micro-batch is scored in several, each with its prompt. At the end there is
    one all-reduce over the data group and one broadcast over the pipeline group.

    Args:
        policy: scored in compute.precision, by the forward pass of training.
        groups: prompts and candidates.
        temperature: logits are divided by it.
        progress: counts groups, those of the other data ranks too.

    Returns:
        [groups][K] in nats, fp64 sums, in the order of the groups.

    Raises:
        DataError: a prompt and one candidate exceed a micro-batch.
    """
    topology, max_tokens = policy.topology, policy.compute.max_tokens_per_microbatch
    split = [list(fit_candidates(group, max_tokens=max_tokens, multiple=topology.token_multiple)) for group in groups]
    pieces = [piece for parts in split for piece in parts]
    completes = [place == len(parts) - 1 for parts in split for place in range(len(parts))]
    plan = plan_microbatches(
        pieces,
        data_size=topology.data_size,
        max_tokens=max_tokens,
        multiple=topology.token_multiple,
        hidden_size=policy.spec.hidden_size,
    )
    starts = [0, *accumulate(len(piece.candidates) for piece in pieces)]
    totals = torch.zeros(starts[-1], dtype=torch.float64, device=topology.device)
    with forward_only(policy.model):
        for step, indices in enumerate(plan[topology.data_rank]):
            if indices or topology.shares_experts:  # equally many passes on every data rank, some of padding only
                sums = _microbatch_logprobs(policy, [pieces[i] for i in indices], temperature)
                places = [place for i in indices for place in range(starts[i], starts[i + 1])]
                if sums is not None:
                    totals[torch.tensor(places).to(topology.device, non_blocking=True)] = sums
            if progress is not None:
                # Micro-batches cost about the same, so the other ranks have done as many.
                progress.advance(sum(completes[i] for rank in plan for i in rank[step]))
    if topology.is_last_stage and topology.data_size > 1:
        dist.all_reduce(totals, group=topology.data_group)
    if topology.pipeline_size > 1:
        dist.broadcast(totals, src=topology.last_stage_rank, group=topology.pipeline_group)
    values = totals.tolist()
    ends = accumulate((len(group.candidates) for group in groups), initial=0)
    return [tuple(values[start:stop]) for start, stop in pairwise(ends)]


def _microbatch_logprobs(policy: Policy, groups: Sequence[Group], temperature: float) -> Tensor | None:
    """Compute a micro-batch's log-probs [C] fp64 on the last pipeline stage; None elsewhere."""
    layout = make_microbatch(groups, multiple=policy.topology.token_multiple).layout.to(policy.topology.device)
    hidden = pipeline_forward(policy, layout)
    if hidden is None:
        return None
    return sequence_logprobs(policy.token_logprobs(hidden, layout, temperature=temperature), layout)
