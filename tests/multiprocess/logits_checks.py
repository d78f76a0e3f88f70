"""What the worker processes of the logits tests do. Run by tests/multiprocess/harness.py on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exo_megatron.checkpoint.policy import load_policy
from exo_megatron.config.sections import ComputeConfig, ParallelConfig
from exo_megatron.logprobs.sequence import token_logprobs
from exo_megatron.models.layout import build_layout
from exo_megatron.models.softcap import soft_cap_
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.rollout.pipeline import forward_only, run_stage

TEMPERATURE = 0.8


@dataclass(frozen=True)
class ShardedLogits:
    """Of a last-stage rank: logits [N, Vp/t] of the row that predicts each response token, candidate after candidate,
    and the tokens' log-probs [N] over the whole vocabulary at TEMPERATURE.
    """

    data_rank: int
    tensor_rank: int
    logits: Tensor
    logprobs: Tensor


def logits_of_groups(
    runtime: Runtime,
    *,
    checkpoint: Path,
    tensor: int,
    pipeline: int,
    sequence: bool,
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[Sequence[int]]],
) -> ShardedLogits | None:
    """One packed row through a converted checkpoint, as in training and reference scoring."""
    compute = ComputeConfig(precision="fp32")
    with model_parallel(
        runtime, ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=sequence), seed=0
    ) as topology:
        model, spec = load_policy(checkpoint, topology, compute)
        layout = build_layout(prompts, candidates, multiple=topology.row_multiple)
        with forward_only(model):
            hidden = run_stage(model, layout, topology)
            if hidden is None:
                return None
            logits = soft_cap_(hidden @ model.output_weight().t(), spec.logit_softcap)
            logprobs = token_logprobs(
                hidden,
                model.output_weight(),
                layout,
                spec=spec,
                temperature=TEMPERATURE,
                chunk_rows=7,
                topology=topology,
            )
    natural = torch.argsort(layout.token_order)
    return ShardedLogits(
        topology.data_rank, topology.tensor_rank, logits[layout.token_row[natural]].clone(), logprobs[natural].clone()
    )
