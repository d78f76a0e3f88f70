"""Stage `align`: EXO or DPO training on candidate groups."""

from __future__ import annotations

from collections.abc import Sequence

from exo_megatron.checkpoint.directory import read_fingerprint, resolve_checkpoint, tokenizer_path
from exo_megatron.checkpoint.policy import load_policy
from exo_megatron.config.stages import AlignConfig
from exo_megatron.data.dataset import load_groups
from exo_megatron.data.groups import Group
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.training.identity import data_digest, run_identity
from exo_megatron.training.objectives import AlignObjective
from exo_megatron.training.optimizer import make_trainee
from exo_megatron.training.prepare import check_groups, read_start
from exo_megatron.training.reference import ReferenceModel, StoredKey, read_stored, store_logprobs
from exo_megatron.training.trainer import GroupsOfStep, Trainer


def run_align(config: AlignConfig, runtime: Runtime) -> None:
    """Align a policy; leaves checkpoints, metrics.jsonl, TensorBoard events and reference log-probs in the output."""
    start = read_start(config)
    groups: Sequence[Group] = load_groups(
        config.data,
        start.tokenizer,
        purpose="rewards" if config.loss.kind in ("exo_rw", "dpo_rw") else "preference",
        candidates=config.candidates,
    )
    check_groups(groups, start.spec, config.compute.max_tokens_per_microbatch)
    reference_path = resolve_checkpoint(config.reference.checkpoint) if config.reference else start.checkpoint
    reference_fingerprint = read_fingerprint(reference_path)
    identity = run_identity(
        groups,
        start.fingerprint + reference_fingerprint,
        config.seed,
        config.compute.precision,
        config.loss,
        config.optimizer,
        config.batch,
    )
    with model_parallel(runtime, config.parallel, seed=config.seed) as topology:
        policy, spec = load_policy(start.checkpoint, topology, config.compute)
        complete: GroupsOfStep = _unchanged
        key = StoredKey(reference_fingerprint, data_digest(groups), config.loss.temperature, config.compute.precision)
        stored = read_stored(config.output, key, groups) if config.reference_logprobs == "stored" else None
        if stored is not None:
            groups = stored
        else:
            live = config.reference_logprobs == "live"
            # Training changes the policy: only log-probs that are computed before it starts can come from it.
            shared = not live and reference_fingerprint == start.fingerprint
            model = policy if shared else load_policy(reference_path, topology, config.compute)[0]
            reference = ReferenceModel(model, spec, topology, config.compute, config.loss.temperature)
            if live:
                complete = reference.complete
            else:
                groups = store_logprobs(config.output, key, reference, groups, runtime)
            del model, reference
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
