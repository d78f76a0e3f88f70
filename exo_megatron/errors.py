"""Errors that a user can cause or act on. This is the lowest module: it imports nothing of ours.

Each is printed as one line on rank 0, without a traceback, and ends the process with its exit code:
2 for wrong input (never worth retrying), 75 for "try again later", 1 for what went wrong without it: a failed
verification, a training that diverged, a lost rank, a device without memory.
"""

from __future__ import annotations


class ExoError(Exception):
    """A failure that is explained to the user in one line.

    Attributes:
        where: file and line (``data.jsonl:12``), config key (``parallel.tensor``), or path.
        problem: the flaw, with the value that was seen.
        expected: the values that would have been accepted.
        fix: the action that the user should take.
    """

    exit_code = 2

    def __init__(self, where: str, problem: str, *, expected: str, fix: str) -> None:
        self.where = where
        self.problem = problem
        self.expected = expected
        self.fix = fix
        super().__init__(f"{where}: {problem}; expected {expected}; fix: {fix}")

    def __reduce__(self) -> tuple[object, ...]:
        """Return the call that rebuilds the error, for pickle.

        Ranks exchange errors pickled, and pickle's default cannot pass keyword arguments.
        """
        return _rebuild, (type(self), self.where, self.problem, self.expected, self.fix)


def _rebuild(kind: type[ExoError], where: str, problem: str, expected: str, fix: str) -> ExoError:
    return kind(where, problem, expected=expected, fix=fix)


class ConfigError(ExoError):
    """A configuration key is unknown, missing, of the wrong type or inconsistent with another."""


class TopologyError(ExoError):
    """The parallel sizes do not fit the world size or the model."""


class WorldError(ExoError):
    """The processes of a run do not meet, or one of them is lost or does not go on."""

    exit_code = 1


class DeviceMemoryError(ExoError):
    """A device has no memory left for what a stage does."""

    exit_code = 1


class OutputInUse(ExoError):
    """Another run that is alive writes to the output directory."""


class DataError(ExoError):
    """A record, file or tokenizer that was read from disk is not usable.

    kind: what is wrong with a record, in the words of reports.
    """

    kind = "malformed"


class EmptyError(DataError):
    """A record has an empty text where a model needs one."""

    kind = "empty"


class OverlongPrompt(DataError):
    """A prompt has more tokens than `data.max_prompt_tokens`."""

    kind = "overlong prompt"


class OverlongAnswer(DataError):
    """A completion has more tokens than `data.max_completion_tokens`."""

    kind = "overlong answer"


class StoredLogprobsError(DataError):
    """Stored log-probs belong to another model, setting or data than a run needs."""

    kind = "log-probs of another source"


class TieError(DataError):
    """Neither candidate of a preference pair is preferred: equal rewards, or the same text twice."""


class EqualRewards(TieError):
    """The candidates of a preference pair have equal rewards."""

    kind = "equal rewards"


class EqualTexts(TieError):
    """The candidates of a preference pair are the same text."""

    kind = "equal pair"


class StorageError(ExoError):
    """A file could not be written: the disk is full, has gone, or refuses.

    No input is wrong, but another try helps only once somebody has made room: its exit code is that
    of what is never worth retrying.
    """


class RewardError(ExoError):
    """A reward source cannot be loaded, or did not return one finite number per candidate."""


class CheckpointError(ExoError):
    """A checkpoint is missing, incomplete or corrupt, or belongs to another model."""


class VerificationFailed(CheckpointError):
    """A conversion differs from its source. It is raised on every rank.

    The output is not moved to its final place.
    """

    exit_code = 1


class TrainingDiverged(ExoError):
    """The loss or the gradient is no longer finite. It is raised on every rank in the same step.

    Nothing of that step is saved.
    """

    exit_code = 1


class TryAgainLater(ExoError):
    """The work stopped for a passing reason, such as preemption, and can be resumed."""

    exit_code = 75


LONGEST_REASON = 240


def reason(error: BaseException) -> str:
    """Return a library's exception as one line of at most LONGEST_REASON characters.

    An exception without text gives the name of its type.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."
