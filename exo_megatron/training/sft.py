"""Stage `sft`: supervised fine-tuning on the chosen completion of each record."""

from __future__ import annotations

from exo_megatron.checkpoint.directory import tokenizer_path
from exo_megatron.checkpoint.policy import load_policy
from exo_megatron.config.stages import SftConfig
from exo_megatron.data.dataset import load_groups
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.rollout.start import find_policy, find_tokenizer
from exo_megatron.training.identity import data_digest, run_identity
from exo_megatron.training.objectives import SftObjective
from exo_megatron.training.optimizer import make_trainee
from exo_megatron.training.prepare import check_groups
from exo_megatron.training.trainer import Trainer


def run_sft(config: SftConfig, runtime: Runtime) -> None:
    """Train on demonstrations; leaves checkpoints, metrics.jsonl and TensorBoard events in `config.output`."""
    start = find_policy(config.model.checkpoint, config.parallel)
    groups = load_groups(config.data, find_tokenizer(start, config.data.tokenizer), purpose="sft")
    check_groups(groups, start.spec, config.compute, config.parallel)
    with model_parallel(runtime, config.parallel, seed=config.seed) as topology:
        policy, spec = load_policy(start.checkpoint, topology, config.compute)
        Trainer(
            trainee=make_trainee(policy, spec, topology, config.compute, config.optimizer),
            objective=SftObjective(),
            groups=groups,
            config=config,
            identity=run_identity(
                data_digest(groups),
                start.fingerprint,
                config.seed,
                config.compute.precision,
                config.optimizer,
                config.batch,
            ),
            hf_files=tokenizer_path(start.checkpoint),
            runtime=runtime,
            label="sft",
            complete_groups=lambda step_groups: step_groups,
        ).run()
