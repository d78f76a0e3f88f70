"""Draws samples from each policy and computes what policy and reference think of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from exo_megatron.checkpoint.policy import load_policy
from exo_megatron.config.stages import EvaluateConfig
from exo_megatron.data.candidates import CandidateRecord
from exo_megatron.data.groups import Group
from exo_megatron.evaluation.targets import Plan, Target
from exo_megatron.models.policy import PolicyModel
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import Topology
from exo_megatron.rollout.generate import generate_records
from exo_megatron.rollout.native import NativeEngine
from exo_megatron.rollout.scoring import candidate_logprobs


@dataclass(frozen=True)
class Drawn:
    """Samples of one checkpoint, in prompt order: P records of M samples, and [P][M] log-probs under it."""

    target: Target
    records: list[CandidateRecord]
    logprobs: list[list[float]]


@dataclass(frozen=True)
class Compared:
    """Samples of one checkpoint with their log-probs [P][M] under the reference as well."""

    drawn: Drawn
    reference_logprobs: list[list[float]]


@dataclass(frozen=True)
class Sampler:
    """Everything that drawing needs beside the model."""

    config: EvaluateConfig
    plan: Plan
    topology: Topology
    runtime: Runtime

    def run(self) -> Iterator[Compared]:
        """Samples of the reference first, then of the targets in order. Collective over the world.

        One model is in memory at a time, the reference last, when all samples that it has to judge are there.
        """
        drawn = [self._draw_from(target) for target in self.plan.targets]
        gc.collect()
        model, spec = load_policy(self.plan.reference.checkpoint, self.topology, self.config.compute)
        own = self._draw(self.plan.reference, model, spec)
        yield Compared(own, own.logprobs)
        for each in drawn:
            yield Compared(each, self._logprobs(model, spec, each.records))

    def _draw_from(self, target: Target) -> Drawn:
        gc.collect()  # the model before this one; modules and their hooks refer to each other in cycles
        model, spec = load_policy(target.checkpoint, self.topology, self.config.compute)
        return self._draw(target, model, spec)

    def _draw(self, target: Target, model: PolicyModel, spec: ModelSpec) -> Drawn:
        """The seed is the same for all models, so that their difference is less noisy than either."""
        records = generate_records(
            NativeEngine(model, spec, self.topology, self.plan.tokenizer.eos_id),
            self.plan.prompts,
            self.plan.tokenizer,
            self.config.sampling,
            seed=self.config.seed,
            topology=self.topology,
            runtime=self.runtime,
            label=target.label,
        )
        shared = self.runtime.broadcast_object(records)
        if shared is None:
            raise RuntimeError("rank 0 broadcast no records")
        return Drawn(target, shared, self._logprobs(model, spec, shared))

    def _logprobs(self, model: PolicyModel, spec: ModelSpec, records: Sequence[CandidateRecord]) -> list[list[float]]:
        """[P][M], on every rank. Takes much less time than drawing, so there is no progress line."""
        pieces = [
            (index, group)
            for index, record in enumerate(records)
            for group in split_record(record, self.config.compute.max_tokens_per_microbatch)
        ]
        found = candidate_logprobs(
            model,
            spec,
            self.topology,
            [group for _, group in pieces],
            self.config.compute,
            temperature=self.config.sampling.temperature,
        )
        values: list[list[float]] = [[] for _ in records]
        for (index, _), part in zip(pieces, found, strict=True):
            values[index] += part
        return values


def split_record(record: CandidateRecord, max_tokens: int) -> Iterator[Group]:
    """The record's candidates, in order, in as few groups as fit into rows of `max_tokens`.

    Log-probs of candidates do not depend on each other, so many samples of a long prompt need not share a row.
    """
    part: list[tuple[int, ...]] = []
    used = len(record.prompt_ids)
    for candidate in record.candidates:
        if part and used + len(candidate.token_ids) > max_tokens:
            yield Group(record.id, record.prompt_ids, tuple(part))
            part, used = [], len(record.prompt_ids)
        part.append(candidate.token_ids)
        used += len(candidate.token_ids)
    yield Group(record.id, record.prompt_ids, tuple(part))
