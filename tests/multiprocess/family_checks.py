"""What the worker processes of the family tests do. Run by tests/multiprocess/harness.py on every rank.

Many models share the process groups of one topology. What one of our own errors ends, on all ranks alike, is
`Refused`: the group goes on with the next model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from exo_megatron.checkpoint.directory import resolve_checkpoint
from exo_megatron.checkpoint.load import load_model
from exo_megatron.config.sections import ComputeConfig, ModelConfig, ParallelConfig, SamplingConfig
from exo_megatron.config.stages import ExportConfig, ImportConfig
from exo_megatron.data.groups import Group
from exo_megatron.data.prompts import Prompt
from exo_megatron.errors import ExoError
from exo_megatron.execution.forward import candidate_logprobs, forward_only, pipeline_forward
from exo_megatron.execution.policy import Policy
from exo_megatron.models.layouts.groups import GroupLayout, build_layout
from exo_megatron.parallel.ending import failing_together
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import Topology, model_parallel
from exo_megatron.rollout.native import NativeEngine
from exo_megatron.stages.export_hf import run_export
from exo_megatron.stages.import_hf import run_import
from tests.reference.tiny_llama import EOS_ID, EosTokenizer

T = TypeVar("T")

COMPUTE = ComputeConfig(precision="fp32", max_tokens_per_microbatch=256, logits_memory_mib=0)


@dataclass(frozen=True)
class Refused:
    """The one line that a user would read."""

    message: str


def attempt(do: Callable[[], T]) -> T | Refused:
    """What it returns, or Refused where it raises one of our errors."""
    try:
        return do()
    except ExoError as error:
        return Refused(str(error))


@dataclass(frozen=True)
class Outputs:
    """Of a last-stage rank. A language model: this rank's columns of the logits [N, Vp/t] that predict the tokens of
    the candidates, one after another, and the tokens' log-probs [N] over the whole vocabulary. A classifier: scores
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


def import_checkpoint(runtime: Runtime, *, hf: Path, output: Path) -> Refused | None:
    """HF directory to distributed checkpoint."""
    return attempt(lambda: run_import(ImportConfig(hf=hf, output=output, dtype="keep"), runtime))


def export_checkpoint(runtime: Runtime, *, checkpoint: Path, output: Path) -> Refused | None:
    """Distributed checkpoint to HF directory."""
    config = ExportConfig(model=ModelConfig(checkpoint=checkpoint), output=output, dtype="keep")
    return attempt(lambda: run_export(config, runtime))


def outputs_of_models(
    runtime: Runtime,
    *,
    checkpoints: Sequence[Path],
    parallel: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[Sequence[int]]],
    temperature: float,
) -> dict[str, Outputs | Refused | None]:
    """By name: one packed micro-batch through each converted checkpoint, as in training and reference scoring."""
    with model_parallel(runtime, ParallelConfig(**parallel), seed=0) as topology:
        layout = build_layout(prompts, candidates, multiple=topology.token_multiple)
        return {
            path.name: attempt(lambda path=path: _outputs(path, layout, topology, temperature)) for path in checkpoints
        }


def policy_of_any_family(checkpoint: Path, topology: Topology) -> Policy:
    """The model of any checkpoint, reward models among them."""
    with failing_together():
        path = resolve_checkpoint(checkpoint)
    model = load_model(path, topology, COMPUTE)
    return Policy(model, topology, COMPUTE, tokenizer=EosTokenizer(EOS_ID))


def _outputs(checkpoint: Path, layout: GroupLayout, topology: Topology, temperature: float) -> Outputs | None:
    policy = policy_of_any_family(checkpoint, topology)
    spec = policy.spec
    with forward_only(policy.model):
        hidden = pipeline_forward(policy, layout)
        if hidden is None:
            return None
        if spec.labels is not None:
            return Outputs(topology.data_rank, topology.tensor_rank, hidden.clone(), None)
        logits = hidden @ policy.model.output_weight().t()
        if spec.logit_softcap is not None:
            logits = spec.logit_softcap * torch.tanh(logits / spec.logit_softcap)
        logprobs = policy.token_logprobs(hidden, layout, temperature=temperature)
    natural = torch.argsort(layout.token_order)
    logits = logits[layout.token_predictor[natural]].clone()
    return Outputs(topology.data_rank, topology.tensor_rank, logits, logprobs[natural].clone())


def generate_and_score(
    runtime: Runtime,
    *,
    checkpoints: Sequence[Path],
    prompts: Sequence[Sequence[int]],
    sampling: dict[str, Any],
    seed: int,
) -> dict[str, list[list[Generated]] | Refused]:
    """By name: candidates of every prompt drawn through the KV cache, and scored in a packed micro-batch without it."""
    settings = SamplingConfig(**sampling)
    asked = [Prompt(id=f"prompt-{i}", text="", ids=tuple(ids)) for i, ids in enumerate(prompts)]
    with model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        return {
            path.name: attempt(lambda path=path: _generated(path, topology, asked, settings, seed))
            for path in checkpoints
        }


def _generated(
    checkpoint: Path, topology: Topology, asked: Sequence[Prompt], sampling: SamplingConfig, seed: int
) -> list[list[Generated]]:
    policy = policy_of_any_family(checkpoint, topology)
    drawn = NativeEngine(policy).generate(asked, sampling, seed=seed, progress=None)
    groups = [
        Group(id=prompt.id, prompt=prompt.ids, candidates=tuple(c.token_ids for c in group.candidates))
        for prompt, group in zip(asked, drawn, strict=True)
    ]
    scored = candidate_logprobs(policy, groups, temperature=sampling.temperature)
    return [
        [Generated(c.token_ids, c.logprob, value) for c, value in zip(group.candidates, values, strict=True)]
        for group, values in zip(drawn, scored, strict=True)
    ]
