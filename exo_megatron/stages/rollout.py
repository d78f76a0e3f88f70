"""The `rollout` stage: K candidates for every prompt of a data set, from one policy."""

from __future__ import annotations

from functools import partial

from exo_megatron.config.stages import RolloutConfig
from exo_megatron.data.candidates import CANDIDATES_FILE, ROLLOUT_FILE, write_candidates
from exo_megatron.data.dataset import load_prompts
from exo_megatron.execution.policy import find_policy, find_tokenizer, load_policy
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.rollout.draw import draw_candidates
from exo_megatron.rollout.lengths import check_lengths, check_microbatch_length
from exo_megatron.rollout.stops import check_stops
from exo_megatron.stages.run import say
from exo_megatron.utils.files import write_json


def run_rollout(config: RolloutConfig, runtime: Runtime) -> None:
    """Write OUTPUT/candidates.jsonl and OUTPUT/rollout.json. Collective over the world.

    Errors in tokenizer, prompts and sizes are raised (DataError, CheckpointError, TopologyError)
    before the model is built.
    """
    source = find_policy(config.model.checkpoint, config.parallel)
    tokenizer = find_tokenizer(source, config.data)
    prompts = load_prompts(
        config.data, tokenizer, tell=partial(say, runtime), report=config.output, team=runtime.team()
    )
    check_stops(tokenizer, config.sampling)
    check_lengths(prompts, config.sampling, source.spec)
    check_microbatch_length(prompts, config.sampling, config.compute, config.parallel)
    with model_parallel(runtime, config.parallel, seed=config.seed) as topology:
        policy = load_policy(source, topology, config.compute, tokenizer)
        drawn = draw_candidates(policy, prompts, config.sampling, seed=config.seed, runtime=runtime, label="rollout")
    if runtime.is_main:
        write_candidates(config.output / CANDIDATES_FILE, drawn.records)
        write_json(
            config.output / ROLLOUT_FILE,
            {
                "checkpoint": str(source.path),
                "fingerprint": source.fingerprint,
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
