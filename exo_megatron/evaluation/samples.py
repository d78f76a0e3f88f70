"""Samples of every checkpoint with their log-probs under the checkpoint and under the reference."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass

from exo_megatron.config.stages import EvaluateConfig
from exo_megatron.data.candidates import CandidateRecord
from exo_megatron.evaluation.targets import Plan, Target
from exo_megatron.execution.policy import Policy, load_policy
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import Topology
from exo_megatron.rollout.draw import draw_candidates, record_logprobs
from exo_megatron.rollout.generate import drawing_progress


@dataclass(frozen=True)
class Drawn:
    """Samples of one checkpoint in the order of the prompts: P records of M samples."""

    target: Target
    records: list[CandidateRecord]

    @property
    def logprobs(self) -> list[tuple[float, ...]]:
        """Log-probs of the samples under the checkpoint, [P][M]."""
        return [record.logprobs for record in self.records]


@dataclass(frozen=True)
class Compared:
    """Samples of one checkpoint with their log-probs [P][M] under the reference as well."""

    drawn: Drawn
    reference_logprobs: list[tuple[float, ...]]


@dataclass(frozen=True)
class Sampler:
    """Everything besides the model that drawing needs."""

    config: EvaluateConfig
    plan: Plan
    topology: Topology
    runtime: Runtime

    def run(self) -> Iterator[Compared]:
        """Draw samples from all checkpoints, and yield those of the reference first.

        Collective over the world. The samples of the targets follow in order. One model is in
        memory at a time; the reference is the last, because it scores the samples of all others.
        """
        drawn = [self._draw_from(target) for target in self.plan.targets]
        reference = self._load(self.plan.reference)
        samples = self._draw(self.plan.reference, reference)
        yield Compared(samples, samples.logprobs)
        temperature = self.config.sampling.temperature
        for each in drawn:  # no progress line: this is much faster than drawing
            yield Compared(each, record_logprobs(reference, each.records, temperature=temperature))

    def _draw_from(self, target: Target) -> Drawn:
        return self._draw(target, self._load(target))

    def _load(self, target: Target) -> Policy:
        gc.collect()  # frees the model before: modules and hooks refer to each other in cycles
        return load_policy(target.source, self.topology, self.config.compute, self.plan.tokenizer)

    def _draw(self, target: Target, policy: Policy) -> Drawn:
        """Draw with the same seed for all models, to reduce the noise of their difference."""
        prompts, sampling = self.plan.prompts, self.config.sampling
        with drawing_progress(target.label, [len(prompts)], sampling, self.topology, self.runtime) as progress:
            drawn = draw_candidates(
                policy, prompts, sampling, seed=self.config.seed, runtime=self.runtime, progress=progress
            )
        return Drawn(target, drawn.records)
