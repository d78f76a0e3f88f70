"""What the worker processes of the family tests do. Run by tests/multiprocess/harness.py on every rank.

What one of our own errors ends, on all ranks alike, is `Refused`: the group goes on with the other models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exo_megatron.checkpoint.policy import load_policy
from exo_megatron.config.sections import ComputeConfig, ParallelConfig, SamplingConfig
from exo_megatron.data.dataset import Prompt
from exo_megatron.data.groups import Group
from exo_megatron.errors import ExoError
from exo_megatron.logprobs.sequence import token_logprobs
from exo_megatron.models.layout import build_layout
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.rollout.native import NativeEngine
from exo_megatron.rollout.pipeline import forward_only, run_stage
from exo_megatron.rollout.scoring import candidate_logprobs
from tests.multiprocess import align_checks
from tests.reference.tiny_llama import EOS_ID

COMPUTE = ComputeConfig(precision="fp32", max_tokens_per_microbatch=256, logprob_chunk_rows=7)


@dataclass(frozen=True)
class Refused:
    """The one line that a user would read."""

    message: str


def refusals(check: Callable[..., Any]) -> Callable[..., Any]:
    """The check, returning Refused where it would raise one of our errors."""

    @functools.wraps(check)
    def attempt(runtime: Runtime, **arguments: Any) -> Any:
        try:
            return check(runtime, **arguments)
        except ExoError as error:
            return Refused(str(error))

    return attempt


import_checkpoint = refusals(align_checks.import_checkpoint)
export_checkpoint = refusals(align_checks.export_checkpoint)


@dataclass(frozen=True)
class Outputs:
    """Of a last-stage rank. A language model: this rank's columns of the logits [N, Vp/t] that predict each response
    token, candidate after candidate, and the tokens' log-probs [N] over the whole vocabulary. A classifier: scores
    [C, labels] in place of the logits.
    """

    data_rank: int
    tensor_rank: int
    logits: Tensor
    logprobs: Tensor | None


@dataclass(frozen=True)
class Generated:
    """A drawn candidate, its log-prob as the engine reports it, and as the same model scores it afterwards."""

    token_ids: tuple[int, ...]
    logprob: float
    scored: float


@refusals
def outputs_of_groups(
    runtime: Runtime,
    *,
    checkpoint: Path,
    parallel: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[Sequence[int]]],
    temperature: float,
) -> Outputs | None:
    """One packed row through a converted checkpoint, as in training and reference scoring."""
    with model_parallel(runtime, ParallelConfig(**parallel), seed=0) as topology:
        model, spec = load_policy(checkpoint, topology, COMPUTE)
        layout = build_layout(prompts, candidates, multiple=topology.row_multiple)
        with forward_only(model):
            hidden = run_stage(model, layout, topology)
            if hidden is None:
                return None
            if spec.labels is not None:
                return Outputs(topology.data_rank, topology.tensor_rank, hidden.clone(), None)
            logits = hidden @ model.output_weight().t()
            if spec.logit_softcap is not None:
                logits = spec.logit_softcap * torch.tanh(logits / spec.logit_softcap)
            logprobs = token_logprobs(
                hidden,
                model.output_weight(),
                layout,
                spec=spec,
                temperature=temperature,
                chunk_rows=COMPUTE.logprob_chunk_rows,
                topology=topology,
            )
    natural = torch.argsort(layout.token_order)
    logits = logits[layout.token_row[natural]].clone()
    return Outputs(topology.data_rank, topology.tensor_rank, logits, logprobs[natural].clone())


@refusals
def generate_and_score(
    runtime: Runtime, *, checkpoint: Path, prompts: Sequence[Sequence[int]], sampling: dict[str, Any], seed: int
) -> list[list[Generated]]:
    """Candidates of every prompt drawn through the KV cache, and scored in a packed row without it."""
    settings = SamplingConfig(**sampling)
    asked = [Prompt(id=f"prompt-{i}", text="", ids=tuple(ids)) for i, ids in enumerate(prompts)]
    with model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        model, spec = load_policy(checkpoint, topology, COMPUTE)
        drawn = NativeEngine(model, spec, topology, EOS_ID).generate(asked, settings, seed=seed, progress=None)
        groups = [
            Group(id=prompt.id, prompt=prompt.ids, candidates=tuple(c.token_ids for c in group.candidates))
            for prompt, group in zip(asked, drawn, strict=True)
        ]
        scored = candidate_logprobs(model, spec, topology, groups, COMPUTE, temperature=settings.temperature)
    return [
        [Generated(c.token_ids, c.logprob, value) for c, value in zip(group.candidates, values, strict=True)]
        for group, values in zip(drawn, scored, strict=True)
    ]
