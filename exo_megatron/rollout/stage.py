"""The `rollout` stage: K candidates for every prompt of a data set, from one policy."""

from __future__ import annotations

from exo_megatron.checkpoint.policy import load_policy
from exo_megatron.config.stages import RolloutConfig
from exo_megatron.data.candidates import CANDIDATES_FILE, ROLLOUT_FILE, write_candidates
from exo_megatron.data.dataset import load_prompts
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.rollout.draw import Policy, draw_candidates
from exo_megatron.rollout.lengths import check_lengths, check_row_length
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
    check_row_length(prompts, config.sampling, config.compute, config.parallel)
    with model_parallel(runtime, config.parallel, seed=config.seed) as topology:
        model, spec = load_policy(start.checkpoint, topology, config.compute)
        drawn = draw_candidates(
            Policy(model, spec, start.fingerprint, tokenizer),
            prompts,
            config.sampling,
            config.compute,
            seed=config.seed,
            topology=topology,
            runtime=runtime,
            label="rollout",
        )
    if runtime.is_main:
        write_candidates(config.output / CANDIDATES_FILE, drawn.records)
        write_json(
            config.output / ROLLOUT_FILE,
            {
                "checkpoint": str(start.checkpoint),
                "fingerprint": start.fingerprint,
                "temperature": config.sampling.temperature,
                "precision": config.compute.precision,
                "top_p": config.sampling.top_p,
                "candidates": config.sampling.candidates,
                "max_new_tokens": config.sampling.max_new_tokens,
                "seed": config.seed,
                "prompts": len(drawn.records),
                "decoding_difference": drawn.decoding_difference,
            },
        )
