"""Stage `align`: EXO or DPO training on candidate groups."""

from __future__ import annotations

from collections.abc import Sequence

from exo_megatron.checkpoint.directory import read_fingerprint, resolve_checkpoint, tokenizer_path
from exo_megatron.checkpoint.policy import load_policy
from exo_megatron.config.stages import AlignConfig
from exo_megatron.data.dataset import load_groups
from exo_megatron.data.groups import Group
from exo_megatron.models.policy import PolicyModel
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import Topology, model_parallel
from exo_megatron.training.identity import data_digest, run_identity
from exo_megatron.training.objectives import AlignObjective
from exo_megatron.training.optimizer import make_trainee
from exo_megatron.training.prepare import check_groups, read_start
from exo_megatron.training.reference import ReferenceModel, StoredKey, read_stored, write_stored
from exo_megatron.training.trainer import GroupsOfStep, Trainer
from exo_megatron.utils.progress import Progress


def run_align(config: AlignConfig, runtime: Runtime) -> None:
    """Align a policy; leaves checkpoints, metrics.jsonl, TensorBoard events and reference log-probs in the output."""
    start = read_start(config)
    purpose = "rewards" if config.loss.kind in ("exo_rw", "dpo_rw") else "preference"
    groups: Sequence[Group] = load_groups(
        config.data, start.tokenizer, purpose=purpose, candidates=config.candidates
    )
    check_groups(groups, start.spec, config.compute.max_tokens_per_microbatch)
    reference_path = resolve_checkpoint(config.reference.checkpoint) if config.reference else start.checkpoint
    reference_fingerprint = read_fingerprint(reference_path)
    identity = run_identity(
        groups, start.fingerprint + reference_fingerprint, config.seed, config.loss, config.optimizer, config.batch
    )
    with model_parallel(runtime, config.parallel, seed=config.seed) as topology:
        reference = _Reference(config, topology, runtime)
        complete: GroupsOfStep = _unchanged
        if config.reference_logprobs == "live":
            complete = reference.wrap(*load_policy(reference_path, topology, config.compute)).complete
        policy, spec = load_policy(start.checkpoint, topology, config.compute)
        if config.reference_logprobs == "stored":
            key = StoredKey(reference_fingerprint, data_digest(groups), config.loss.temperature)
            same = reference_fingerprint == start.fingerprint
            groups = read_stored(config.output, key, groups) or reference.compute(
                *((policy, spec) if same else load_policy(reference_path, topology, config.compute)), key, groups
            )
        Trainer(
            trainee=make_trainee(policy, spec, topology, config.compute, config.optimizer),
            objective=AlignObjective(config.loss),
            groups=groups,
            config=config,
            identity=identity,
            hf_files=tokenizer_path(start.checkpoint),
            runtime=runtime,
            label="align",
            complete_groups=complete,
        ).run()


def _unchanged(groups: Sequence[Group]) -> Sequence[Group]:
    return groups


class _Reference:
    """Makes reference models of one run."""

    def __init__(self, config: AlignConfig, topology: Topology, runtime: Runtime) -> None:
        self.config = config
        self.topology = topology
        self.runtime = runtime

    def wrap(self, model: PolicyModel, spec: ModelSpec) -> ReferenceModel:
        """A model that is only read."""
        return ReferenceModel(model, spec, self.topology, self.config.compute, self.config.loss.temperature)

    def compute(
        self, model: PolicyModel, spec: ModelSpec, key: StoredKey, groups: Sequence[Group]
    ) -> Sequence[Group]:
        """Log-probs of all groups, stored in the output directory."""
        progress = Progress("reference log-probs", len(groups), "groups", enabled=self.runtime.is_main)
        completed = self.wrap(model, spec).complete(groups, progress)
        progress.close()
        write_stored(self.config.output, key, completed, self.runtime)
        return completed
