"""The rollout engine on the training model itself: tensor- and pipeline-parallel, continuous batching, KV cache."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from exo_megatron.config.sections import SamplingConfig
from exo_megatron.data.dataset import Prompt
from exo_megatron.errors import ConfigError
from exo_megatron.logprobs.logits import gathered_logits
from exo_megatron.models.decode import DecodeLayout, KvCache, build_decode_layout
from exo_megatron.models.policy import PolicyModel
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.topology import Topology
from exo_megatron.rollout.engine import GeneratedCandidate, GeneratedGroup
from exo_megatron.rollout.pipeline import accompany, announce_pass, forward_only, run_stage
from exo_megatron.rollout.sampling import draw_tokens, uniforms
from exo_megatron.rollout.scheduler import ActiveCandidate, Pass, Scheduler
from exo_megatron.utils.progress import Progress

MAX_PREFILL_TOKENS = 4096
"""Prompt tokens prefilled in one pass, beside the decoded ones: enough to keep the matrix products large."""


class NativeEngine:
    """RolloutEngine on this rank's part of the policy."""

    def __init__(self, model: PolicyModel, spec: ModelSpec, topology: Topology, eos_id: int) -> None:
        """eos_id: the token that ends a candidate."""
        self._model = model
        self._spec = spec
        self._topology = topology
        self._eos_id = eos_id

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, seed: int, progress: Progress | None
    ) -> list[GeneratedGroup]:
        """See RolloutEngine. Raises ConfigError if the KV cache does not fit into the device's memory.

        Where model copies share experts, collective over all of them, which make equally many passes.
        Every pass: one all-gather of logits over the tensor group of the last stage, one broadcast of the drawn
        tokens over that group and one over each pipeline group.
        """
        with forward_only(self._model):
            groups = self._generate(prompts, sampling, seed, progress) if prompts else []
            accompany(self._model, self._topology)
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
            eos_id=self._eos_id,
        )
        cache = self._allocate(prompts, sampling, scheduler.prompt_slots)
        numbers = _UniformNumbers(prompts, sampling, seed)
        results: list[dict[int, GeneratedCandidate]] = [{} for _ in prompts]
        meter = _Meter(progress)
        while (work := scheduler.next_pass()) is not None:
            layout = self._lay_out(cache, work)
            announce_pass(self._topology)
            hidden = run_stage(self._model, layout, self._topology)
            tokens, logprobs = self._draw(hidden, layout, work, sampling, numbers)
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
                layer_numbers=[layer.layer_number for layer in self._model.decoder.layers],
                prompt_slots=prompt_slots,
                prompt_length=max(len(prompt.ids) for prompt in prompts),
                candidate_slots=candidate_slots,
                # The last token of a candidate is never fed.
                candidate_length=sampling.max_new_tokens - 1,
                kv_heads=self._spec.kv_heads // self._topology.tensor_size,
                head_dim=self._spec.head_dim,
                dtype=self._model.config.params_dtype,
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
            multiple=self._topology.row_multiple,
            device=self._topology.device,
        )

    def _draw(
        self,
        hidden: Tensor | None,
        layout: DecodeLayout,
        work: Pass,
        sampling: SamplingConfig,
        numbers: _UniformNumbers,
    ) -> tuple[list[int], list[float]]:
        """Tokens and log-probs of `work.draws`, drawn by tensor rank 0 of the last stage, on every rank."""
        topology = self._topology
        drawn = torch.empty((2, len(work.draws)), dtype=torch.float64, device=topology.device)
        if hidden is not None:
            predicting = hidden[layout.predict_rows, 0]
            logits = gathered_logits(predicting, self._model.output_weight(), self._spec, topology)
            if topology.tensor_rank == 0:
                rows = torch.tensor([row for _, row in work.draws]).to(topology.device, non_blocking=True)
                uniform = torch.from_numpy(numbers.of(work.draws)).to(topology.device, non_blocking=True)
                # A token id is exact in fp64.
                drawn[0], drawn[1] = draw_tokens(
                    logits, rows, uniform, temperature=sampling.temperature, top_p=sampling.top_p
                )
            if topology.tensor_size > 1:
                source = dist.get_process_group_ranks(topology.tensor_group)[0]
                dist.broadcast(drawn, src=source, group=topology.tensor_group)
        if topology.pipeline_size > 1:
            dist.broadcast(drawn, src=topology.last_stage_rank, group=topology.pipeline_group)
        tokens, logprobs = drawn.tolist()
        return [int(token) for token in tokens], logprobs


class _UniformNumbers:
    """The uniform numbers of the prompts that are being decoded."""

    def __init__(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int) -> None:
        self._prompts = prompts
        self._sampling = sampling
        self._seed = seed
        self._tables: dict[int, npt.NDArray[np.float64]] = {}

    def of(self, draws: Sequence[tuple[ActiveCandidate, int]]) -> npt.NDArray[np.float64]:
        """One number per draw: that of the candidate's next step."""
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
    """Reports completed candidates and the mean rate of tokens of this model copy."""

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
