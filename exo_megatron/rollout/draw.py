"""Candidates with their log-probs: drawn, then scored by the forward pass of training while the model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exo_megatron.config.sections import ComputeConfig, SamplingConfig
from exo_megatron.data.candidates import CandidateRecord
from exo_megatron.data.dataset import Prompt
from exo_megatron.data.logprob_source import LogprobSource
from exo_megatron.data.tokenizer import Tokenizer
from exo_megatron.models.policy import PolicyModel
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import Topology
from exo_megatron.rollout.generate import generate_records
from exo_megatron.rollout.native import NativeEngine
from exo_megatron.rollout.record_logprobs import largest_difference, record_logprobs, with_logprobs


@dataclass(frozen=True)
class Drawn:
    """decoding_difference: the largest one between log-probs of decoding and of the training pass, nats per token."""

    records: list[CandidateRecord]
    decoding_difference: float


@dataclass(frozen=True)
class Policy:
    """A loaded model that draws. fingerprint: of its checkpoint."""

    model: PolicyModel
    spec: ModelSpec
    fingerprint: str
    tokenizer: Tokenizer


def draw_candidates(
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    compute: ComputeConfig,
    *,
    seed: int,
    topology: Topology,
    runtime: Runtime,
    label: str,
) -> Drawn:
    """K candidates for each prompt, in prompt order, on every rank. Collective over the world.

    Their log-probs are of softmax(logits / sampling.temperature), whatever top_p is: what losses and estimates
    compare, and what `align` takes for reference log-probs. Decoding computes them too, from its cache and rounded
    otherwise. label: of the progress lines of rank 0. compute: decides on precision and rows; see check_row_length.
    """
    engine = NativeEngine(policy.model, policy.spec, topology, policy.tokenizer.eos_id)
    generated = runtime.broadcast_object(
        generate_records(
            engine, prompts, policy.tokenizer, sampling, seed=seed, topology=topology, runtime=runtime, label=label
        )
    )
    if generated is None:
        raise RuntimeError("rank 0 broadcast no records")
    logprobs = record_logprobs(
        policy.model,
        policy.spec,
        topology,
        generated,
        compute,
        temperature=sampling.temperature,
        label=f"{label}: log-probs" if runtime.is_main else None,
    )
    source = LogprobSource(policy.fingerprint, sampling.temperature, compute.precision)
    records = with_logprobs(generated, logprobs, source)
    return Drawn(records, largest_difference(generated, records))
