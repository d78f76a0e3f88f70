"""The checkpoints that an evaluation compares, and the checks before the first one is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from exo_megatron.checkpoint.directory import STEPS_DIRECTORY, list_steps, read_step, resolve_checkpoint, skipped_steps
from exo_megatron.config.document import read_document
from exo_megatron.config.stages import CONFIG_FILE, EvaluateConfig
from exo_megatron.data.dataset import load_prompts
from exo_megatron.data.prompts import Prompt
from exo_megatron.data.tokenizer import Tokenizer
from exo_megatron.errors import CheckpointError, ConfigError, DataError
from exo_megatron.evaluation.estimates import REFERENCE_NAME
from exo_megatron.execution.policy import PolicyCheckpoint, find_policy, find_tokenizer
from exo_megatron.models.spec import ModelSpec
from exo_megatron.rollout.lengths import check_lengths, check_microbatch_length
from exo_megatron.rollout.stops import check_stops
from exo_megatron.utils.team import ALONE, Team


@dataclass(frozen=True)
class Target:
    """One checkpoint to evaluate.

    `step` is the number of optimizer steps behind it, None for a converted model.
    """

    name: str
    step: int | None
    source: PolicyCheckpoint

    @property
    def label(self) -> str:
        """Name and step, for messages."""
        return self.name if self.step is None else f"{self.name} step {self.step}"


@dataclass(frozen=True)
class Plan:
    """The targets, the reference, their common tokenizer and the tokenised prompts with their digest."""

    reference: Target
    targets: tuple[Target, ...]
    tokenizer: Tokenizer
    prompts: tuple[Prompt, ...]
    prompts_digest: str

    def digests(self) -> dict[str, str]:
        """Return digests of all that was read, by what it is."""
        steps = [(each.name, each.step, each.source.fingerprint) for each in (self.reference, *self.targets)]
        return {
            "checkpoints": hashlib.sha256(repr(steps).encode()).hexdigest(),
            "tokenizer": self.tokenizer.digest,
            "prompts": self.prompts_digest,
        }


def make_plan(config: EvaluateConfig, tell: Callable[[str], object], team: Team = ALONE) -> Plan:
    """Find the checkpoints and read the prompts; `tell` gets lines about the data. Collective over the team.

    Raises ExoError for a missing checkpoint, a model that cannot be cut as `parallel` says or has
    another vocabulary than the reference, fewer than two prompts, and prompts that leave no room
    for the samples.
    """
    source = find_policy(config.reference.checkpoint, config.parallel, tell)
    reference = Target(REFERENCE_NAME, read_step(source.path), source)
    found = [each for name, path in config.models.items() for each in find_checkpoints(name, path)]
    for path in config.models.values():
        for line in skipped_steps(path):
            tell(line)
    tokenizer = find_tokenizer(source, config.data)
    prompts = load_prompts(config.data, tokenizer, tell=tell, report=config.output, team=team)
    _check_number(prompts, config)
    check_stops(tokenizer, config.sampling)
    check_microbatch_length(prompts, config.sampling, config.compute, config.parallel)
    targets = tuple(Target(name, step, find_policy(path, config.parallel, tell)) for name, step, path in found)
    for target in (reference, *targets):
        check_lengths(prompts, config.sampling, target.source.spec)
        _check_vocabulary(target, source.spec)
    return Plan(reference, targets, tokenizer, tuple(prompts), prompts.digest)


def find_checkpoints(name: str, path: Path) -> list[tuple[str, int | None, Path]]:
    """Find the checkpoint at `path`, or every complete step of the training output there.

    Returns name, step and directory of each, ascending. Raises ConfigError for the reference's
    name.
    """
    if name == REFERENCE_NAME:
        raise ConfigError(
            f"models.{name}",
            "this name stands for the reference policy",
            expected="another name",
            fix="rename the model; the reference is evaluated anyway",
        )
    steps = list_steps(path)
    if steps:
        return [(name, step, checkpoint) for step, checkpoint in steps]
    checkpoint = resolve_checkpoint(path)
    return [(name, read_step(checkpoint), checkpoint)]


def _check_number(prompts: Sequence[Prompt], config: EvaluateConfig) -> None:
    if len(prompts) < 2:
        raise DataError(
            config.data.path,
            f"has {len(prompts)} prompt",
            expected="at least 2 prompts, for a standard error",
            fix="add prompts, or raise data.limit",
        )


def _check_vocabulary(target: Target, reference: ModelSpec) -> None:
    spec = target.source.spec
    if spec.vocab_size != reference.vocab_size:
        raise CheckpointError(
            str(target.source.path),
            f"has a vocabulary of {spec.vocab_size}",
            expected=f"{reference.vocab_size}, that of the reference",
            fix="compare models that were trained from the reference",
        )


def describe_disagreement(plan: Plan, temperature: float) -> str | None:
    """Describe in a line which models were trained at another temperature than they are sampled at.

    None if there are none. Models of which nothing is known, and those of SFT, are left out.
    """
    trained = {each.name: training_temperature(each.source.path) for each in (plan.reference, *plan.targets)}
    others = {name: found for name, found in trained.items() if found not in (None, temperature)}
    if not others:
        return None
    wanted = set(others.values())
    change = f"={wanted.pop()}" if len(wanted) == 1 else " to that of the training"
    return (
        f"sampling.temperature is {temperature}, but loss.temperature was "
        f"{', '.join(f'{found} in the training of {name}' for name, found in others.items())}: "
        "reward and KL are those of other distributions than the loss compared; to make them agree, set "
        f"sampling.temperature{change}"
    )


def training_temperature(checkpoint: Path) -> float | None:
    """Read the loss.temperature with which a checkpoint was trained from its training output.

    None if the checkpoint is in no training output, or its training had none, as SFT.
    """
    steps = checkpoint.resolve().parent
    if steps.name != STEPS_DIRECTORY:
        return None
    try:
        loss = read_document(steps.parent / CONFIG_FILE).data.get("loss")
    except ConfigError:  # the directory is not, or no longer, as a stage leaves it
        return None
    temperature = loss.get("temperature") if isinstance(loss, dict) else None
    return temperature if isinstance(temperature, int | float) else None
