"""The `rollout` stage: K candidates for every prompt of a data set, from one policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial

from exo_megatron import __version__
from exo_megatron.config.stages import CANDIDATES_DIRECTORY, RolloutConfig
from exo_megatron.data.candidates import ROLLOUT_FILE, least_bytes, stored_candidates
from exo_megatron.data.dataset import load_prompts
from exo_megatron.data.prepared import Prepared
from exo_megatron.data.prompts import Prompt
from exo_megatron.data.shards import RunShards, count_shards, link_only_shard, records_of
from exo_megatron.data.tokenizer import Tokenizer
from exo_megatron.execution.policy import Policy, PolicyCheckpoint, find_policy, find_tokenizer, load_policy
from exo_megatron.parallel.ending import check_same, on_main
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.rollout.draw import draw_candidates
from exo_megatron.rollout.generate import drawing_progress
from exo_megatron.rollout.lengths import check_lengths, check_microbatch_length
from exo_megatron.rollout.stops import check_stops
from exo_megatron.rollout.units import plan_units
from exo_megatron.stages.run import say, writing
from exo_megatron.utils.disk import check_space
from exo_megatron.utils.files import write_json

DIFFERENCE = "decoding_difference"
"""Name of the note beside a shard: of the candidates of its unit, and in rollout.json of all."""


def run_rollout(config: RolloutConfig, runtime: Runtime) -> None:
    """Write the shards of OUTPUT/candidates, and OUTPUT/rollout.json. Collective over the world.

    Prompts are done in units of whole shards, of which a process has one in memory. Units that an
    interrupted run with the same policy, prompts and sampling has finished are kept. Errors in
    tokenizer, prompts and sizes are raised (DataError, CheckpointError, TopologyError) before the model
    is built.
    """
    source = find_policy(config.model.checkpoint, config.parallel, partial(say, runtime))
    tokenizer = find_tokenizer(source, config.data)
    prompts = load_prompts(
        config.data, tokenizer, tell=partial(say, runtime), report=config.output, team=runtime.team()
    )
    check_stops(tokenizer, config.sampling)
    check_lengths(prompts, config.sampling, source.spec)
    check_microbatch_length(prompts, config.sampling, config.compute, config.parallel)
    run = _digest(config, source, tokenizer, prompts)
    seen = {"prompts": prompts.digest, "tokenizer": tokenizer.digest, "policy": source.fingerprint, "settings": run}
    check_same(runtime, seen)
    shards = RunShards(config.output / CANDIDATES_DIRECTORY, count_shards(len(prompts)), run)
    with model_parallel(runtime, config.parallel, seed=config.seed) as topology:
        finished = on_main(runtime, lambda: writing(config.output, shards.take_over))
        units = plan_units(shards.count, config.sampling, topology.data_size)
        kept = [unit for unit in units if all(number in finished for number in unit)]
        differences = [finished[number][DIFFERENCE] for unit in kept for number in unit]
        if len(kept) < len(units):
            left = len(prompts) - sum(len(records_of(unit, len(prompts))) for unit in kept)
            needed = least_bytes(left, config.sampling.candidates)
            on_main(runtime, lambda: check_space(config.output, needed))
            runtime.begin("rollout: loading the model")
            policy = load_policy(source, topology, config.compute, tokenizer)
            differences += _draw_units(config, policy, prompts, shards, units, kept, runtime)
    if runtime.is_main:
        link_only_shard(config.output, shards)
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
                "prompts": len(prompts),
                DIFFERENCE: max(differences),
            },
        )


def _draw_units(
    config: RolloutConfig,
    policy: Policy,
    prompts: Sequence[Prompt],
    shards: RunShards,
    units: Sequence[range],
    kept: Sequence[range],
    runtime: Runtime,
) -> list[float]:
    """Draw and write the units that are not `kept`, and return their decoding differences.

    Collective over the world. Each rank writes other shards of a unit.
    """
    differences = []
    left = [unit for unit in units if unit not in kept]
    sizes, done = ([len(records_of(unit, len(prompts))) for unit in each] for each in (left, kept))
    with drawing_progress("rollout", sizes, config.sampling, policy.topology, runtime, done=done) as progress:
        for unit in left:
            numbers = records_of(unit, len(prompts))
            runtime.begin(f"rollout: prompts {numbers.start} to {numbers.stop - 1}")
            drawn = draw_candidates(
                policy,
                prompts[numbers.start : numbers.stop],
                config.sampling,
                seed=config.seed,
                runtime=runtime,
                progress=progress,
            )
            notes = {DIFFERENCE: drawn.decoding_difference}
            for shard in unit[runtime.rank :: runtime.world_size]:
                part = records_of(range(shard, shard + 1), len(prompts))
                records = drawn.records[part.start - numbers.start : part.stop - numbers.start]
                writing(config.output, partial(shards.write, shard, map(stored_candidates, records), notes))
            differences.append(drawn.decoding_difference)
    return differences


def _digest(config: RolloutConfig, source: PolicyCheckpoint, tokenizer: Tokenizer, prompts: Prepared[Prompt]) -> str:
    """Return the SHA-256 of all that decides what is drawn, but for the rounding of another topology."""
    settings = {
        "version": __version__,
        "fingerprint": source.fingerprint,
        "precision": config.compute.precision,
        "seed": config.seed,
        "sampling": config.sampling.model_dump(mode="json", exclude={"max_active_candidates"}),
        "tokenizer": str(tokenizer.path),
        "stops": sorted(tokenizer.stop_ids),
        "absent": tokenizer.absent_ids,
        "prompts": prompts.digest,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
