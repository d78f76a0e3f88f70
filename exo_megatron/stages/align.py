"""The `align` stage: training on candidate groups with EXO, DPO or another loss of the table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from exo_megatron.config.losses import LossSpec
from exo_megatron.config.stages import AlignConfig
from exo_megatron.data.dataset import load_groups
from exo_megatron.data.groups import Group, GroupLengths
from exo_megatron.data.logprob_source import LogprobSource
from exo_megatron.data.packing import check_groups, check_whole
from exo_megatron.data.prepared import PreparedGroups
from exo_megatron.data.stored_logprobs import WantedLogprobs
from exo_megatron.execution.policy import PolicyCheckpoint, find_policy_and_reference, find_tokenizer, load_policy
from exo_megatron.parallel.ending import check_same
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.stages.run import say
from exo_megatron.training.objectives import AlignObjective
from exo_megatron.training.optimizer import make_trainee
from exo_megatron.training.reference import add_logprobs, complete_groups
from exo_megatron.training.trainer import GroupsOfStep, Trainer, run_identity


def run_align(config: AlignConfig, runtime: Runtime) -> None:
    """Align a policy.

    Writes checkpoints, metrics.jsonl, TensorBoard events and computed reference log-probs to the
    output. Collective over the world. Errors in checkpoints, data and sizes are raised before a
    model is built.
    """
    objective = AlignObjective.of(config.loss)
    source, reference, logprobs, groups = _find_data(config, objective.loss.spec, runtime)
    check_groups(groups, source.spec, config.compute, config.parallel)
    if objective.loss.spec.token_logps:
        check_whole(groups, config.compute, config.parallel)
    objective.rehearse(groups)
    data = groups.digest
    check_same(runtime, {"data": data, "policy": source.fingerprint, "reference": reference.fingerprint})
    with model_parallel(runtime, config.parallel, seed=config.seed) as topology:
        runtime.begin("align: loading the model")
        policy = load_policy(source, topology, config.compute)
        # The policy is still untrained: if it is the reference itself, no second model is loaded.
        same = reference.fingerprint == source.fingerprint
        load_reference = partial(load_policy, reference, topology, config.compute)
        scoring = partial(add_logprobs, temperature=config.loss.temperature)
        complete_step: GroupsOfStep = _unchanged
        if config.reference_logprobs == "live":
            complete_step = partial(scoring, load_reference())
        else:
            runtime.begin("align: reference log-probs")
            groups = complete_groups(
                groups,
                config.output,
                logprobs,
                lambda: partial(scoring, policy if same else load_reference()),
                runtime,
            )
        identity = run_identity(
            data,
            source.fingerprint + reference.fingerprint,
            config.seed,
            config.compute.precision,
            config.loss,
            config.optimizer,
            config.batch,
        )
        Trainer(
            trainee=make_trainee(policy, config.optimizer),
            objective=objective,
            groups=groups,
            config=config,
            identity=identity,
            hf_files=source.hf_files,
            runtime=runtime,
            label="align",
            complete_groups=complete_step,
        ).run()


def prepare_align(config: AlignConfig, runtime: Runtime) -> GroupLengths:
    """Tokenise the data of a run, and return its lengths. Collective over the world."""
    *_, groups = _find_data(config, AlignObjective.of(config.loss).loss.spec, runtime)
    return groups.lengths


def _find_data(
    config: AlignConfig, loss: LossSpec, runtime: Runtime
) -> tuple[PolicyCheckpoint, PolicyCheckpoint, LogprobSource, PreparedGroups]:
    """Find the checkpoints of policy and reference, describe the reference log-probs, and read the groups.

    Collective over the world.
    """
    source, reference = find_policy_and_reference(
        config.model, config.reference, config.parallel, partial(say, runtime)
    )
    logprobs = LogprobSource(reference.fingerprint, config.loss.temperature, config.compute.precision)
    groups = load_groups(
        config.data,
        find_tokenizer(source, config.data),
        purpose=loss.compares,
        candidates=config.candidates,
        pairs=config.pairs,
        ties=config.ties,
        logprobs=WantedLogprobs(logprobs, reference.path) if config.reference_logprobs == "stored" else None,
        loss=loss,
        temperature=config.loss.temperature,
        tell=partial(say, runtime),
        report=config.output,
        team=runtime.team(),
    )
    return source, reference, logprobs, groups


def _unchanged(groups: Sequence[Group]) -> Sequence[Group]:
    return groups
