"""Log-probs of stored candidates under the forward pass of training, and records that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from exo_megatron.config.sections import ComputeConfig
from exo_megatron.data.candidates import CandidateRecord
from exo_megatron.data.groups import Group
from exo_megatron.data.logprob_source import LogprobSource
from exo_megatron.models.policy import PolicyModel
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.topology import Topology
from exo_megatron.rollout.scoring import candidate_logprobs
from exo_megatron.utils.progress import Progress


def record_logprobs(
    model: PolicyModel,
    spec: ModelSpec,
    topology: Topology,
    records: Sequence[CandidateRecord],
    compute: ComputeConfig,
    *,
    temperature: float,
    label: str | None = None,
) -> list[tuple[float, ...]]:
    """[records][K] log-probs in nats under softmax(logits / temperature), fp64 sums, on every rank.

    Collective over the world; every rank passes all records. label: of a progress line, on the rank that is to print
    one. Raises DataError for a prompt and candidate that exceed a row.
    """
    groups = [
        Group(record.id, record.prompt_ids, tuple(candidate.token_ids for candidate in record.candidates))
        for record in records
    ]
    with Progress(label or "", len(groups), "groups", enabled=label is not None) as progress:
        return candidate_logprobs(model, spec, topology, groups, compute, temperature=temperature, progress=progress)


def with_logprobs(
    records: Sequence[CandidateRecord], logprobs: Sequence[Sequence[float]], source: LogprobSource
) -> list[CandidateRecord]:
    """The records with these [records][K] log-probs, tied to the source and to their token ids."""
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
    """Of the candidates' log-probs while they were drawn and now, per token, in nats."""
    return max(
        abs(before.logprob - after.logprob) / len(before.token_ids)
        for one, other in zip(drawn, scored, strict=True)
        for before, after in zip(one.candidates, other.candidates, strict=True)
        if before.logprob is not None and after.logprob is not None
    )
