"""The `rollout` stage: K candidates for every prompt of a data set, from one policy."""

from __future__ import annotations

from collections.abc import Sequence

from exo_megatron.checkpoint.policy import load_policy
from exo_megatron.config.sections import SamplingConfig
from exo_megatron.config.stages import RolloutConfig
from exo_megatron.data.candidates import CANDIDATES_FILE, ROLLOUT_FILE, write_candidates
from exo_megatron.data.dataset import Prompt, load_prompts
from exo_megatron.errors import DataError
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.rollout.generate import generate_records
from exo_megatron.rollout.native import NativeEngine
from exo_megatron.rollout.start import find_policy, find_tokenizer
from exo_megatron.utils.files import write_json


def run_rollout(config: RolloutConfig, runtime: Runtime) -> None:
    """Write OUTPUT/candidates.jsonl and OUTPUT/rollout.json. Collective over the world.

    What can be wrong with tokenizer, prompts and sizes is raised (DataError, CheckpointError, TopologyError) before
    the model is built.
    """
    start = find_policy(config.model.checkpoint, config.parallel)
    tokenizer = find_tokenizer(start, config.data.tokenizer)
    prompts = load_prompts(config.data, tokenizer)
    check_lengths(prompts, config.sampling, start.spec)
    with model_parallel(runtime, config.parallel, seed=config.seed) as topology:
        model, spec = load_policy(start.checkpoint, topology, config.compute)
        engine = NativeEngine(model, spec, topology, tokenizer.eos_id)
        records = generate_records(
            engine, prompts, tokenizer, config.sampling, seed=config.seed, topology=topology, runtime=runtime
        )
    if records is not None:
        write_candidates(config.output / CANDIDATES_FILE, records)
        write_json(
            config.output / ROLLOUT_FILE,
            {
                "fingerprint": start.fingerprint,
                "temperature": config.sampling.temperature,
                "top_p": config.sampling.top_p,
                "candidates": config.sampling.candidates,
                "max_new_tokens": config.sampling.max_new_tokens,
                "seed": config.seed,
                "prompts": len(records),
            },
        )


def check_lengths(prompts: Sequence[Prompt], sampling: SamplingConfig, spec: ModelSpec) -> None:
    """Raise DataError, naming the prompt, if prompt and candidate together exceed the model's positions."""
    for prompt in prompts:
        total = len(prompt.ids) + sampling.max_new_tokens
        if total > spec.max_positions:
            raise DataError(
                f"prompt {prompt.id!r}",
                f"{len(prompt.ids)} tokens + sampling.max_new_tokens {sampling.max_new_tokens} = {total}",
                expected=f"at most the model's {spec.max_positions} positions",
                fix="lower sampling.max_new_tokens or data.max_prompt_tokens, or drop the prompt",
            )
