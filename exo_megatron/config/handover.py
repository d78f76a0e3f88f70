"""What stages of one run must agree on, because one uses what another stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from exo_megatron.config.checks import Problem, within
from exo_megatron.config.stages import AlignConfig, RolloutConfig, ScoreConfig, StageConfig

COMPUTE_ANEW = "or set reference_logprobs to computed"


def find_disagreements(config: StageConfig, earlier: Sequence[StageConfig]) -> Iterator[Problem]:
    """Why an `align` would refuse the log-probs that an earlier rollout of the run is going to store for it."""
    if not isinstance(config, AlignConfig) or config.reference_logprobs != "stored":
        return
    rollout = _rollout_behind(Path(config.data.path), earlier)
    if rollout is None:
        return
    stored, needed = rollout.sampling.temperature, config.loss.temperature
    if stored != needed:
        yield Problem(
            ("loss", "temperature"),
            f"got {needed}, but the rollout stores log-probs at sampling.temperature {stored}",
            f"{stored}",
            f"make both equal, {COMPUTE_ANEW}",
        )
    if rollout.compute.precision != config.compute.precision:
        yield Problem(
            ("compute", "precision"),
            f"got {config.compute.precision}, but the rollout stores log-probs of {rollout.compute.precision}",
            rollout.compute.precision,
            f"make both equal, {COMPUTE_ANEW}",
        )
    key, reference = ("model", config.model) if config.reference is None else ("reference", config.reference)
    drew, judges = (_maker(path, earlier) for path in (rollout.model.checkpoint, reference.checkpoint))
    if drew is not None and judges is not None and drew.output != judges.output:
        yield Problem(
            (key, "checkpoint"),
            f"got {reference.checkpoint}, but the rollout stores log-probs of {rollout.model.checkpoint}",
            "the policy that drew the candidates as the reference",
            f"set reference.checkpoint to it, {COMPUTE_ANEW}",
        )


def _rollout_behind(data: Path, earlier: Sequence[StageConfig]) -> RolloutConfig | None:
    """The rollout that draws these candidates, with or without a `score` between."""
    match _maker(data, earlier):
        case RolloutConfig() as rollout:
            return rollout
        case ScoreConfig() as score:
            return _rollout_behind(score.candidates, earlier)
    return None


def _maker(path: Path, earlier: Sequence[StageConfig]) -> StageConfig | None:
    """The stage whose output `path` is or lies in."""
    return next((each for each in earlier if within(path, each.output)), None)
