"""Candidates with log-probs: drawn, then scored by the forward pass of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from exo_megatron.config.sections import SamplingConfig
from exo_megatron.data.candidates import CandidateRecord
from exo_megatron.data.groups import Group
from exo_megatron.data.logprob_source import LogprobSource
from exo_megatron.data.prompts import Prompt
from exo_megatron.execution.forward import candidate_logprobs
from exo_megatron.execution.policy import Policy
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.rollout.generate import generate_records
from exo_megatron.rollout.native import NativeEngine
from exo_megatron.utils.progress import Progress


def record_logprobs(
    policy: Policy, records: Sequence[CandidateRecord], *, temperature: float
) -> list[tuple[float, ...]]:
    """Compute the log-probs of stored candidates under softmax(logits / temperature).

    Collective over the world; every rank passes all records and gets all results.

    Args:
        policy: the policy that scores.
        records: prompts and candidates.
        temperature: logits are divided by it.

    Returns:
        [records][K] in nats, fp64 sums.

    Raises:
        DataError: a prompt and a candidate exceed a micro-batch.
    """
    groups = [
        Group(record.id, record.prompt_ids, tuple(candidate.token_ids for candidate in record.candidates))
        for record in records
    ]
    return candidate_logprobs(policy, groups, temperature=temperature)


def with_logprobs(
    records: Sequence[CandidateRecord], logprobs: Sequence[Sequence[float]], source: LogprobSource
) -> list[CandidateRecord]:
    """Return records with their [records][K] log-probs, tied to the source and token ids."""
    return [
        replace(
            record,
            candidates=tuple(
                replace(candidate, logprob=value, logprob_digest=source.digest(record.prompt_ids, candidate.token_ids))
                for candidate, value in zip(record.candidates, values, strict=True)
            ),
            logprob_source=source,
        )
        for record, values in zip(records, logprobs, strict=True)
    ]


def largest_difference(drawn: Sequence[CandidateRecord], scored: Sequence[CandidateRecord]) -> float:
    """Compute the largest difference of log-probs of decoding and scoring, nats per token."""
    return max(
        abs(before.logprob - after.logprob) / len(before.token_ids)
        for one, other in zip(drawn, scored, strict=True)
        for before, after in zip(one.candidates, other.candidates, strict=True)
        if before.logprob is not None and after.logprob is not None
    )


@dataclass(frozen=True)
class DrawnCandidates:
    """Candidates with log-probs.

    decoding_difference: the largest difference between log-probs of decoding and of the training
    pass, in nats per token.
    """

    records: list[CandidateRecord]
    decoding_difference: float


def draw_candidates(
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    *,
    seed: int,
    runtime: Runtime,
    progress: Progress | None = None,
) -> DrawnCandidates:
    """Draw K candidates for each prompt, in prompt order, on every rank. Collective over the world.

    Their log-probs are of softmax(logits / sampling.temperature), whatever top_p is: losses and
    estimates compare these, and `align` uses them as reference log-probs. Decoding computes them
    too, from its cache and with other rounding.

    Args:
        policy: loaded with its tokenizer.
        prompts: all prompts, which must have passed `check_microbatch_length`.
        sampling: K, temperature, top_p and length.
        seed: of the draws.
        runtime: the world.
        progress: counts the candidates of this rank's model copy. Their log-probs, which take much
            less time, are not counted.
    """
    engine = NativeEngine(policy)
    drawn = generate_records(engine, prompts, sampling, policy, seed=seed, runtime=runtime, progress=progress)
    generated = runtime.broadcast_items(drawn or [])
    logprobs = record_logprobs(policy, generated, temperature=sampling.temperature)
    source = LogprobSource(policy.fingerprint, sampling.temperature, policy.compute.precision)
    records = with_logprobs(generated, logprobs, source)
    return DrawnCandidates(records, largest_difference(generated, records))
