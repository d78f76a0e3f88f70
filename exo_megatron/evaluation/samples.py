"""Draws samples from each policy and computes what policy and reference think of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from exo_megatron.checkpoint.directory import read_fingerprint
from exo_megatron.checkpoint.policy import load_policy
from exo_megatron.config.stages import EvaluateConfig
from exo_megatron.data.candidates import CandidateRecord
from exo_megatron.evaluation.targets import Plan, Target
from exo_megatron.models.policy import PolicyModel
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import Topology
from exo_megatron.rollout.draw import Policy, draw_candidates
from exo_megatron.rollout.record_logprobs import record_logprobs


@dataclass(frozen=True)
class Drawn:
    """Samples of one checkpoint, in prompt order: P records of M samples, with their log-probs under it."""

    target: Target
    records: list[CandidateRecord]

    @property
    def logprobs(self) -> list[tuple[float, ...]]:
        """[P][M]."""
        return [record.logprobs for record in self.records]


@dataclass(frozen=True)
class Compared:
    """Samples of one checkpoint with their log-probs [P][M] under the reference as well."""

    drawn: Drawn
    reference_logprobs: list[tuple[float, ...]]


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
        drawn = draw_candidates(
            Policy(model, spec, read_fingerprint(target.checkpoint), self.plan.tokenizer),
            self.plan.prompts,
            self.config.sampling,
            self.config.compute,
            seed=self.config.seed,
            topology=self.topology,
            runtime=self.runtime,
            label=target.label,
        )
        return Drawn(target, drawn.records)

    def _logprobs(
        self, model: PolicyModel, spec: ModelSpec, records: Sequence[CandidateRecord]
    ) -> list[tuple[float, ...]]:
        """[P][M], on every rank. Takes much less time than drawing, so there is no progress line."""
        temperature = self.config.sampling.temperature
        return record_logprobs(model, spec, self.topology, records, self.config.compute, temperature=temperature)
