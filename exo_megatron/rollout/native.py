"""The rollout engine on the training model, with continuous batching and a KV cache."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from exo_megatron.config.sections import SamplingConfig
from exo_megatron.data.prompts import Prompt
from exo_megatron.errors import ConfigError
from exo_megatron.execution.forward import announce_pass, forward_only, pipeline_forward, run_idle_passes
from exo_megatron.execution.policy import Policy
from exo_megatron.logprobs.logits import gathered_logits
from exo_megatron.models.attention.cache import KvCache
from exo_megatron.models.layouts.decode import DecodeLayout, build_decode_layout
from exo_megatron.rollout.engine import GeneratedCandidate, GeneratedGroup
from exo_megatron.rollout.sampling import draw_tokens, uniforms
from exo_megatron.rollout.scheduler import ActiveCandidate, Pass, Scheduler
from exo_megatron.rollout.stops import StopRule
from exo_megatron.utils.progress import Progress

MAX_PREFILL_TOKENS = 4096
"""Prompt tokens prefilled in one pass; enough for large matrix products."""


class NativeEngine:
    """RolloutEngine on this rank's part of a policy."""

    def __init__(self, policy: Policy) -> None:
        """Use a policy loaded with its tokenizer, whose stop tokens end a candidate."""
        self._policy = policy
        self._topology = policy.topology
        self._tokenizer = policy.text_tokenizer
        absent = self._tokenizer.absent_ids
        self._absent = torch.tensor(absent, device=self._topology.device) if absent else None

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, seed: int, progress: Progress | None
    ) -> list[GeneratedGroup]:
        """Draw one group per prompt. See RolloutEngine.

        Every pass has one all-gather of logits over the tensor group of the last pipeline stage,
        one broadcast of the drawn tokens over that group and one over each pipeline group. Where
        model copies share experts, the call is collective over all of them, and they make equally
        many passes. Raises ConfigError if the KV cache does not fit into the device's memory.
        """
        with forward_only(self._policy.model):
            groups = self._generate(prompts, sampling, seed, progress) if prompts else []
            run_idle_passes(self._policy)
        return groups

    def _generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int, progress: Progress | None
    ) -> list[GeneratedGroup]:
        scheduler = Scheduler(
            [prompt.ids for prompt in prompts],
            candidates=sampling.candidates,
            max_new_tokens=sampling.max_new_tokens,
            max_active=sampling.max_active_candidates,
            max_prefill_tokens=MAX_PREFILL_TOKENS,
            ends=StopRule(self._tokenizer, sampling).ends,
        )
        cache = self._allocate(prompts, sampling, scheduler.prompt_slots)
        numbers = _UniformNumbers(prompts, sampling, seed)
        results: list[dict[int, GeneratedCandidate]] = [{} for _ in prompts]
        meter = _Meter(progress)
        while (work := scheduler.next_pass()) is not None:
            layout = self._lay_out(cache, work)
            announce_pass(self._topology)
            hidden = pipeline_forward(self._policy, layout)
            tokens, logprobs = self._draw(hidden, work, sampling, numbers)
            completed = scheduler.accept(tokens, logprobs)
            for candidate in completed:
                results[candidate.prompt.index][candidate.number] = GeneratedCandidate(
                    tuple(candidate.tokens), candidate.finished, candidate.logprob
                )
            numbers.forget(completed)
            meter.count(len(tokens), len(completed))
        return [
            GeneratedGroup(prompt.id, tuple(group[number] for number in range(sampling.candidates)))
            for prompt, group in zip(prompts, results, strict=True)
        ]

    def _allocate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, prompt_slots: int) -> KvCache:
        candidate_slots = min(sampling.max_active_candidates, sampling.candidates * len(prompts))
        try:
            return KvCache(
                layer_numbers=[layer.layer_number for layer in self._policy.model.decoder.layers],
                prompt_slots=prompt_slots,
                prompt_length=max(len(prompt.ids) for prompt in prompts),
                candidate_slots=candidate_slots,
                # The last token of a candidate is never fed.
                candidate_length=sampling.max_new_tokens - 1,
                kv_heads=self._policy.spec.kv_heads // self._topology.tensor_size,
                head_dim=self._policy.spec.head_dim,
                dtype=self._policy.model.config.params_dtype,
                device=self._topology.device,
            )
        except torch.OutOfMemoryError:
            raise ConfigError(
                "sampling.max_active_candidates",
                f"the KV cache of {candidate_slots} candidates and {prompt_slots} prompts does not fit into the "
                f"memory of {self._topology.device}",
                expected="fewer candidates at once",
                fix="lower it, or raise parallel.tensor or parallel.pipeline",
            ) from None

    def _lay_out(self, cache: KvCache, work: Pass) -> DecodeLayout:
        cache.move_candidates(work.candidate_moves)
        cache.move_prompts(work.prompt_moves)
        return build_decode_layout(
            cache,
            active=[(c.tokens[-1], c.prompt.slot, len(c.tokens) - 1) for c in work.active],
            prompt_lengths=[len(prompt.tokens) for prompt in work.prompts],
            admitted=[(prompt.slot, prompt.tokens) for prompt in work.admitted],
            multiple=self._topology.token_multiple,
            device=self._topology.device,
        )

    def _draw(
        self,
        hidden: Tensor | None,
        work: Pass,
        sampling: SamplingConfig,
        numbers: _UniformNumbers,
    ) -> tuple[list[int], list[float]]:
        """Draw tokens and log-probs of `work.draws`, equal on every rank.

        Tensor rank 0 of the last pipeline stage draws; one broadcast over its tensor group and one
        over each pipeline group.
        """
        topology = self._topology
        drawn = torch.empty((2, len(work.draws)), dtype=torch.float64, device=topology.device)
        if hidden is not None:
            logits = gathered_logits(hidden, self._policy.model.output_weight(), self._policy.spec, topology)
            if topology.tensor_rank == 0:
                places = torch.tensor([place for _, place in work.draws]).to(topology.device, non_blocking=True)
                uniform = torch.from_numpy(numbers.of(work.draws)).to(topology.device, non_blocking=True)
                # A token id is exact in fp64.
                drawn[0], drawn[1] = draw_tokens(logits, places, uniform, sampling, self._absent)
            if topology.tensor_size > 1:
                source = dist.get_process_group_ranks(topology.tensor_group)[0]
                dist.broadcast(drawn, src=source, group=topology.tensor_group)
        if topology.pipeline_size > 1:
            dist.broadcast(drawn, src=topology.last_stage_rank, group=topology.pipeline_group)
        tokens, logprobs = drawn.tolist()
        return [int(token) for token in tokens], logprobs


class _UniformNumbers:
    """The uniform numbers in [0, 1) of the prompts that are being decoded."""

    def __init__(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int) -> None:
        self._prompts = prompts
        self._sampling = sampling
        self._seed = seed
        self._tables: dict[int, npt.NDArray[np.float64]] = {}

    def of(self, draws: Sequence[tuple[ActiveCandidate, int]]) -> npt.NDArray[np.float64]:
        """Return one number per draw: that of the candidate's next step."""
        return np.array([self._table(c.prompt.index)[c.number, len(c.tokens)] for c, _ in draws])

    def forget(self, completed: Sequence[ActiveCandidate]) -> None:
        """Drop the numbers of prompts whose candidates are all complete."""
        for candidate in completed:
            if candidate.prompt.unfinished == 0:
                self._tables.pop(candidate.prompt.index, None)

    def _table(self, index: int) -> npt.NDArray[np.float64]:
        if index not in self._tables:
            self._tables[index] = uniforms(
                self._seed,
                self._prompts[index].id,
                candidates=self._sampling.candidates,
                steps=self._sampling.max_new_tokens,
            )
        return self._tables[index]


class _Meter:
    """Meter that reports completed candidates and the mean rate of tokens of this model copy."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._tokens = 0
        self._start = time.monotonic()

    def count(self, tokens: int, completed: int) -> None:
        """Add the draws of one pass."""
        self._tokens += tokens
        if self._progress is not None:
            elapsed = max(time.monotonic() - self._start, 1e-9)
            self._progress.advance(completed, **{"tokens/s": self._tokens / elapsed})
