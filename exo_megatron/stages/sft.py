"""The `sft` stage: supervised fine-tuning on the chosen candidate of each record."""

from __future__ import annotations

from functools import partial

from exo_megatron.config.stages import SftConfig
from exo_megatron.data.dataset import load_groups
from exo_megatron.data.groups import GroupLengths
from exo_megatron.data.packing import check_groups
from exo_megatron.data.prepared import PreparedGroups
from exo_megatron.execution.policy import PolicyCheckpoint, find_policy, find_tokenizer, load_policy
from exo_megatron.parallel.ending import check_same
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
    source = find_policy(config.model.checkpoint, config.parallel, partial(say, runtime))
    groups = _read_groups(config, source, runtime)
    check_groups(groups, source.spec, config.compute, config.parallel)
    check_same(runtime, {"data": groups.digest, "policy": source.fingerprint})
    identity = run_identity(
        groups.digest,
        source.fingerprint,
        config.seed,
        config.compute.precision,
        config.optimizer,
        config.batch,
    )
    with model_parallel(runtime, config.parallel, seed=config.seed) as topology:
        runtime.begin("sft: loading the model")
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


def prepare_sft(config: SftConfig, runtime: Runtime) -> GroupLengths:
    """Tokenise the data of a run, and return its lengths. Collective over the world."""
    return _read_groups(
        config, find_policy(config.model.checkpoint, config.parallel, partial(say, runtime)), runtime
    ).lengths


def _read_groups(config: SftConfig, source: PolicyCheckpoint, runtime: Runtime) -> PreparedGroups:
    return load_groups(
        config.data,
        find_tokenizer(source, config.data),
        purpose="sft",
        tell=partial(say, runtime),
        report=config.output,
        team=runtime.team(),
    )
