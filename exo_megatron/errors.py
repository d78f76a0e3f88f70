"""Errors that a user can cause or act on. Lowest module of the package: imports nothing of ours.

Each is printed as one line on rank 0, without a traceback, and ends the process with its exit code:
2 for wrong input (never worth retrying), 75 for "try again later".
"""

from __future__ import annotations


class ExoError(Exception):
    """A failure that is explained to the user in one line.

    where: file and line (``data.jsonl:12``), config key (``parallel.tensor``), or path.
    problem: what was seen, with the value.
    expected: what would have been accepted.
    fix: what to do.
    """

    exit_code = 2

    def __init__(self, where: str, problem: str, *, expected: str, fix: str) -> None:
        self.where = where
        self.problem = problem
        self.expected = expected
        self.fix = fix
        super().__init__(f"{where}: {problem}; expected {expected}; fix: {fix}")

    def __reduce__(self) -> tuple[object, ...]:
        """Errors travel between ranks pickled; keyword arguments do not fit the default."""
        return _rebuild, (type(self), self.where, self.problem, self.expected, self.fix)


def _rebuild(kind: type[ExoError], where: str, problem: str, expected: str, fix: str) -> ExoError:
    return kind(where, problem, expected=expected, fix=fix)


class ConfigError(ExoError):
    """A configuration key is unknown, missing, of the wrong type or inconsistent with another."""


class TopologyError(ExoError):
    """The parallel sizes do not fit the world size or the model."""


class DataError(ExoError):
    """A record, file or tokenizer that was read from disk is not usable."""


class RewardError(ExoError):
    """A reward source cannot be loaded or returned something that is not a finite number per candidate."""


class CheckpointError(ExoError):
    """A checkpoint is missing, incomplete, corrupt, or belongs to another model."""


class VerificationFailed(CheckpointError):
    """A conversion is not what it was made from. Raised on every rank; the output is not put into its place."""

    exit_code = 1


class TrainingDiverged(ExoError):
    """Loss or gradient stopped being finite. Raised on every rank on the same step; nothing is saved from it."""

    exit_code = 1


class TryAgainLater(ExoError):
    """The work stopped for a passing reason (preemption, an endpoint that is down) and can be resumed."""

    exit_code = 75
