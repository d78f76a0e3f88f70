"""Candidates for a list of prompts, drawn over all data-parallel ranks, as records to store."""

from __future__ import annotations

from collections.abc import Sequence

from exo_megatron.config.sections import SamplingConfig
from exo_megatron.data.candidates import Candidate, CandidateRecord
from exo_megatron.data.prompts import Prompt
from exo_megatron.data.tokenizer import Tokenizer
from exo_megatron.execution.policy import Policy
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import Topology
from exo_megatron.rollout.engine import GeneratedGroup, RolloutEngine
from exo_megatron.utils.progress import Progress


def generate_records(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    policy: Policy,
    *,
    seed: int,
    runtime: Runtime,
    progress: Progress | None = None,
) -> list[CandidateRecord] | None:
    """Draw K candidates for each prompt, in prompt order, on rank 0 of the world; else None.

    Collective over the world: every rank passes all prompts, and each model copy draws its share.
    `progress` counts the candidates of this rank's model copy (see `drawing_progress`).
    """
    topology = policy.topology
    share = split_by_length([len(prompt.ids) for prompt in prompts], topology.data_size)[topology.data_rank]
    groups = engine.generate([prompts[index] for index in share], sampling, seed=seed, progress=progress)
    speaks = topology.tensor_rank == 0 and topology.is_first_stage
    gathered = runtime.gather_items(list(zip(share, groups, strict=True)) if speaks else [])
    if gathered is None:
        return None
    by_index = dict(gathered)
    return [_record(prompt, by_index[index], policy.text_tokenizer) for index, prompt in enumerate(prompts)]


def drawing_progress(
    label: str,
    sizes: Sequence[int],
    sampling: SamplingConfig,
    topology: Topology,
    runtime: Runtime,
    *,
    done: Sequence[int] = (),
) -> Progress:
    """Make the progress line of rank 0, which counts the candidates of its own model copy.

    Args:
        label: of the line.
        sizes: numbers of prompts that are drawn for, one after another.
        sampling: K.
        topology: the model copies.
        runtime: the world.
        done: the same of an earlier process.
    """
    before, own = (
        sum(len(range(topology.data_rank, size, topology.data_size)) for size in each) * sampling.candidates
        for each in (done, sizes)
    )
    if topology.data_size > 1:
        label = f"{label} (1 of {topology.data_size} model copies)"
    return Progress(label, before + own, "candidates", enabled=runtime.is_main, initial=before)


def split_by_length(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Split indices into `parts` lists, longest first, so that the lists cost about the same."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[part::parts] for part in range(parts)]


def _record(prompt: Prompt, group: GeneratedGroup, tokenizer: Tokenizer) -> CandidateRecord:
    return CandidateRecord(
        id=prompt.id,
        prompt=prompt.text,
        prompt_ids=prompt.ids,
        candidates=tuple(
            Candidate(
                text=tokenizer.decode_completion(candidate.token_ids),
                token_ids=candidate.token_ids,
                finished=candidate.finished,
                logprob=candidate.logprob,
            )
            for candidate in group.candidates
        ),
        chat=prompt.chat,
        columns=prompt.columns,
    )
