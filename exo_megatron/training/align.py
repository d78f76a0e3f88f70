"""Stage `align`: EXO or DPO training on candidate groups."""

from __future__ import annotations

from collections.abc import Sequence

from exo_megatron.checkpoint.directory import tokenizer_path
from exo_megatron.checkpoint.policy import load_policy
from exo_megatron.config.stages import AlignConfig
from exo_megatron.data.dataset import load_groups
from exo_megatron.data.groups import Group
from exo_megatron.data.logprob_source import LogprobSource
from exo_megatron.data.stored_logprobs import WantedLogprobs
from exo_megatron.errors import CheckpointError
from exo_megatron.models.policy import PolicyModel
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import Topology, model_parallel
from exo_megatron.rollout.start import Start, find_policy, find_tokenizer
from exo_megatron.training.identity import data_digest, run_identity
from exo_megatron.training.objectives import AlignObjective
from exo_megatron.training.optimizer import make_trainee
from exo_megatron.training.prepare import check_groups
from exo_megatron.training.reference import ReferenceModel, complete_groups
from exo_megatron.training.trainer import GroupsOfStep, Trainer


def run_align(config: AlignConfig, runtime: Runtime) -> None:
    """Align a policy; leaves checkpoints, metrics.jsonl, TensorBoard events and reference log-probs in the output."""
    start = find_policy(config.model.checkpoint, config.parallel)
    reference = _find_reference(config, start)
    groups = load_groups(
        config.data,
        find_tokenizer(start, config.data.tokenizer),
        purpose="rewards" if config.loss.kind in ("exo_rw", "dpo_rw") else "preference",
        candidates=config.candidates,
        logprobs=_wanted_logprobs(config, reference),
    )
    check_groups(groups, start.spec, config.compute, config.parallel)
    identity = run_identity(
        data_digest(groups),
        start.fingerprint + reference.fingerprint,
        config.seed,
        config.compute.precision,
        config.loss,
        config.optimizer,
        config.batch,
    )
    with model_parallel(runtime, config.parallel, seed=config.seed) as topology:
        policy, spec = load_policy(start.checkpoint, topology, config.compute)
        completed, complete_step = _prepare_reference(config, start, reference, policy, groups, topology, runtime)
        Trainer(
            trainee=make_trainee(policy, spec, topology, config.compute, config.optimizer),
            objective=AlignObjective(config.loss),
            groups=completed,
            config=config,
            identity=identity,
            hf_files=tokenizer_path(start.checkpoint),
            runtime=runtime,
            label="align",
            complete_groups=complete_step,
        ).run()


def _find_reference(config: AlignConfig, start: Start) -> Start:
    """The reference checkpoint. Raises CheckpointError if it has another vocabulary than the policy."""
    if config.reference is None:
        return start
    reference = find_policy(config.reference.checkpoint, config.parallel)
    if reference.spec.vocab_size != start.spec.vocab_size:
        raise CheckpointError(
            f"reference.checkpoint {reference.checkpoint}",
            f"has a vocabulary of {reference.spec.vocab_size}",
            expected=f"{start.spec.vocab_size}, as the policy's",
            fix="take a reference with the policy's tokenizer",
        )
    return reference


def _wanted_logprobs(config: AlignConfig, reference: Start) -> WantedLogprobs | None:
    """What log-probs of the data must be of to be used; None where they are not to be looked at."""
    if config.reference_logprobs != "stored":
        return None
    return WantedLogprobs(_source(config, reference), reference.checkpoint)


def _source(config: AlignConfig, reference: Start) -> LogprobSource:
    return LogprobSource(reference.fingerprint, config.loss.temperature, config.compute.precision)


def _prepare_reference(
    config: AlignConfig,
    start: Start,
    reference: Start,
    policy: PolicyModel,
    groups: Sequence[Group],
    topology: Topology,
    runtime: Runtime,
) -> tuple[Sequence[Group], GroupsOfStep]:
    """Reference log-probs, known or to come: the groups as far as they are complete, and what completes a step's.

    `policy` is untrained still: where it is the reference itself, no second model is loaded. None is loaded at all
    where the data brought all log-probs.
    """

    def wrapped(model: PolicyModel) -> ReferenceModel:
        return ReferenceModel(model, reference.spec, topology, config.compute, config.loss.temperature)

    def load() -> ReferenceModel:
        is_start = reference.fingerprint == start.fingerprint
        return wrapped(policy if is_start else load_policy(reference.checkpoint, topology, config.compute)[0])

    if config.reference_logprobs == "live":
        return groups, wrapped(load_policy(reference.checkpoint, topology, config.compute)[0]).complete
    return complete_groups(groups, config.output, _source(config, reference), load, runtime), _unchanged


def _unchanged(groups: Sequence[Group]) -> Sequence[Group]:
    return groups
