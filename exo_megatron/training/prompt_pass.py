"""The pass of a prompt in front of the parts of its group: forward first of all, backward when all parts are done."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from exo_megatron.models.shared_prompt import PromptLayout
from exo_megatron.training.forward import stage_output
from exo_megatron.training.optimizer import Trainee


@dataclass(frozen=True)
class PromptPass:
    """The graph between what this stage received (None on the first) and its output, both [S / t, 1, H].

    The last stage's output is [1, H].
    """

    layout: PromptLayout
    received: Tensor | None
    output: Tensor


def forward_prompt(trainee: Trainee, layout: PromptLayout) -> PromptPass:
    """Fill `layout.shared` on every stage. Point to point over the pipeline: hidden states in the parameters' dtype."""
    topology = trainee.topology
    received = None
    if not topology.is_first_stage:
        received = torch.empty(
            (layout.row.row_length // topology.row_multiple, 1, trainee.spec.hidden_size),
            dtype=trainee.policy.config.pipeline_dtype,
            device=topology.device,
        )
        dist.recv(received, src=_neighbour(trainee, -1), group=topology.pipeline_group)
        trainee.policy.set_input_tensor(received.requires_grad_())
    output = stage_output(trainee.model, layout)
    if not topology.is_last_stage:
        dist.send(output.detach().contiguous(), dst=_neighbour(trainee, 1), group=topology.pipeline_group)
    return PromptPass(layout, received, output)


def backward_prompt(trainee: Trainee, prompt: PromptPass) -> None:
    """Add the gradients that the parts have left in `layout.shared` to those of this stage's weights.

    Point to point over the pipeline, last stage first: gradients of the hidden states.
    """
    topology = trainee.topology
    if topology.is_last_stage:
        grad = prompt.layout.shared.hidden_gradient()
    else:
        grad = torch.empty_like(prompt.output, memory_format=torch.contiguous_format)
        dist.recv(grad, src=_neighbour(trainee, 1), group=topology.pipeline_group)
    torch.autograd.backward(prompt.output, grad)
    if prompt.received is not None and prompt.received.grad is not None:
        dist.send(prompt.received.grad.contiguous(), dst=_neighbour(trainee, -1), group=topology.pipeline_group)


def _neighbour(trainee: Trainee, step: int) -> int:
    """World rank of the pipeline stage before (-1) or after (1) this one."""
    ranks = dist.get_process_group_ranks(trainee.topology.pipeline_group)
    return ranks[trainee.topology.pipeline_rank + step]
