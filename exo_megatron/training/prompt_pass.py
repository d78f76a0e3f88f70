"""The pass of a prompt in front of the parts of its group: forward first of all, backward when all parts are done."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exo_megatron.models.shared_prompt import PromptLayout
from exo_megatron.rollout.pipeline import receive_from_stage, received_hidden, send_to_stage
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
        received = received_hidden(trainee.policy, layout.row.row_length, topology).requires_grad_()
        trainee.policy.set_input_tensor(received)
    output = stage_output(trainee.model, layout)
    if not topology.is_last_stage:
        send_to_stage(output.detach(), 1, topology)
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
        receive_from_stage(grad, 1, topology)
    torch.autograd.backward(prompt.output, grad)
    if prompt.received is not None and prompt.received.grad is not None:
        send_to_stage(prompt.received.grad, -1, topology)
