"""The `sft` stage: supervised fine-tuning on the chosen candidate of each record."""

from __future__ import annotations

from functools import partial

from exo_megatron.config.stages import SftConfig
from exo_megatron.data.dataset import load_groups
from exo_megatron.data.packing import check_groups
from exo_megatron.execution.policy import find_policy, find_tokenizer, load_policy
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.stages.run import say
from exo_megatron.training.objectives import SftObjective
from exo_megatron.training.optimizer import make_trainee
from exo_megatron.training.trainer import Trainer, run_identity


def run_sft(config: SftConfig, runtime: Runtime) -> None:
    """Train on demonstrations.

    Writes checkpoints, metrics.jsonl and TensorBoard events to `config.output`. Collective over the
    world.
    """
    source = find_policy(config.model.checkpoint, config.parallel)
    tokenizer = find_tokenizer(source, config.data)
    groups = load_groups(
        config.data, tokenizer, purpose="sft", tell=partial(say, runtime), report=config.output, team=runtime.team()
    )
    check_groups(groups, source.spec, config.compute, config.parallel)
    identity = run_identity(
        groups.digest,
        source.fingerprint,
        config.seed,
        config.compute.precision,
        config.optimizer,
        config.batch,
    )
    with model_parallel(runtime, config.parallel, seed=config.seed) as topology:
        policy = load_policy(source, topology, config.compute)
        Trainer(
            trainee=make_trainee(policy, config.optimizer),
            objective=SftObjective(),
            groups=groups,
            config=config,
            identity=identity,
            hf_files=source.hf_files,
            runtime=runtime,
            label="sft",
            complete_groups=lambda step_groups: step_groups,
        ).run()
