"""A forward pass without gradients through the stages of one pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from exo_megatron.models.decode import DecodeLayout
from exo_megatron.models.layout import GroupLayout, build_layout
from exo_megatron.models.policy import PolicyModel
from exo_megatron.parallel.topology import Topology


@contextmanager
def forward_only(model: PolicyModel) -> Iterator[None]:
    """Evaluation mode without gradients; the model's mode is restored.

    `no_grad` and not `inference_mode`: megatron-core keeps buffers between passes, which training must be able to
    save for its backward.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def run_stage(model: PolicyModel, layout: GroupLayout | DecodeLayout, topology: Topology) -> Tensor | None:
    """This rank's share of one pass: receive from the stage before, compute, send to the stage after.

    layout: on the topology's device, the same on all ranks of the model-parallel group. Point to point over the
    pipeline group: hidden states [S, 1, H] ([S / t, 1, H] under sequence parallelism) in the parameters' dtype.
    Returns the last stage's output (see PolicyModel), None on the others.
    """
    if not topology.is_first_stage:
        model.set_input_tensor(received_hidden(model, layout.row_length, topology))
    output: Tensor = model(layout.input_ids[None], layout.position_ids[None], None, packed_seq_params=layout)
    if topology.is_last_stage:
        return output
    send_to_stage(output, 1, topology)
    return None


def received_hidden(model: PolicyModel, row_length: int, topology: Topology) -> Tensor:
    """What the stage before has sent of a row of that many tokens: [S, 1, H], or [S / t, 1, H], in its dtype."""
    hidden = torch.empty(
        (row_length // topology.row_multiple, 1, model.config.hidden_size),
        dtype=model.config.pipeline_dtype,
        device=topology.device,
    )
    receive_from_stage(hidden, -1, topology)
    return hidden


def receive_from_stage(tensor: Tensor, step: int, topology: Topology) -> None:
    """Overwrite `tensor`, which is contiguous, with what the stage before (-1) or after (1) this one has sent."""
    dist.recv(tensor, src=_neighbour(step, topology), group=topology.pipeline_group)


def send_to_stage(tensor: Tensor, step: int, topology: Topology) -> None:
    """Send to the stage before (-1) or after (1) this one."""
    dist.send(tensor.contiguous(), dst=_neighbour(step, topology), group=topology.pipeline_group)


def _neighbour(step: int, topology: Topology) -> int:
    """Its rank in the world."""
    return dist.get_process_group_ranks(topology.pipeline_group)[topology.pipeline_rank + step]


def announce_pass(topology: Topology) -> None:
    """Before a pass: tell the model copies that share experts with this one to take part. See `accompany`."""
    _somebody_works(topology, True)


def accompany(model: PolicyModel, topology: Topology) -> None:
    """Passes of nothing but padding until no model copy that shares experts with this one announces any more.

    A pass through shared experts is collective over the copies, whose numbers of passes differ: each announces its
    own and then accompanies the others. Returns at once where every copy has experts of its own.
    """
    padding = build_layout([], [], multiple=topology.row_multiple).to(topology.device)
    while _somebody_works(topology, False):
        run_stage(model, padding, topology)


def _somebody_works(topology: Topology, here: bool) -> bool:
    """Whether any of the copies that share experts has a pass to do (one all-reduce over the expert group)."""
    if not topology.shares_experts:
        return here
    flag = torch.tensor(int(here), device=topology.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=topology.expert_group)
    return bool(flag.item())
