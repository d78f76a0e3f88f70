"""The forward pass of a row in training: the rank's stage of the policy, and log-probs behind the last one."""

from __future__ import annotations

import torch
from torch import Tensor

from exo_megatron.logprobs.sequence import token_logprobs
from exo_megatron.models.layout import GroupLayout
from exo_megatron.models.shared_prompt import PartLayout, PromptLayout
from exo_megatron.training.optimizer import Trainee


def stage_output(model: torch.nn.Module, layout: GroupLayout | PromptLayout | PartLayout) -> Tensor:
    """What this rank's pipeline stage makes of a row on its device (see PolicyModel)."""
    row = layout if isinstance(layout, GroupLayout) else layout.row
    output: Tensor = model(row.input_ids[None], row.position_ids[None], None, packed_seq_params=layout)
    return output


def row_logprobs(trainee: Trainee, output: Tensor, row: GroupLayout, temperature: float) -> Tensor:
    """[N] fp32 log-probs of the row's response tokens from the last stage's output. One all-gather over TP."""
    return token_logprobs(
        output,
        trainee.policy.output_weight(),
        row,
        spec=trainee.spec,
        temperature=temperature,
        memory_mib=trainee.compute.logits_memory_mib,
        topology=trainee.topology,
    )
