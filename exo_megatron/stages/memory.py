"""The error that tells of a device without memory, and which settings need less of it."""

from __future__ import annotations

import socket

import torch

from exo_megatron.config.stages import AlignConfig, EvaluateConfig, RolloutConfig, ScoreConfig, SftConfig, StageConfig
from exo_megatron.errors import DeviceMemoryError, reason
from exo_megatron.parallel.runtime import Runtime

SIGNS = ("out of memory", "defaultcpuallocator", "alloc_failed")
"""Words, in lower case, of libraries that have no exception of their own for want of memory."""


def out_of_memory(error: Exception, config: StageConfig, runtime: Runtime) -> DeviceMemoryError | None:
    """Return the error to raise for a library's, if that is want of memory; None for all others."""
    told = isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)
    if not (told or isinstance(error, torch.OutOfMemoryError | MemoryError)):
        return None
    return DeviceMemoryError(
        f"rank {runtime.rank} on {socket.gethostname()}, {runtime.device}",
        reason(error),
        expected="memory for what the stage does at once",
        fix=_advice(config),
    )


def _advice(config: StageConfig) -> str:
    """Name the settings that need less memory, with their values, those that cost least time first."""
    cut = "raise parallel.tensor or parallel.pipeline"
    match config:
        case SftConfig() | AlignConfig():
            recompute = "" if config.compute.recompute == "full" else "; set compute.recompute=full"
            return f"lower {_tokens(config)}{recompute}; {cut}"
        case RolloutConfig():
            return f"lower {_candidates(config)} or {_tokens(config)}; {cut}"
        case EvaluateConfig():
            return f"lower {_candidates(config)}, {_tokens(config)} or {_rewards(config)}; {cut}"
        case ScoreConfig():
            return f"lower {_rewards(config)}"
    return "end what else uses this device"


def _tokens(config: SftConfig | AlignConfig | RolloutConfig | EvaluateConfig) -> str:
    tokens = config.compute.max_tokens_per_microbatch
    return f"compute.max_tokens_per_microbatch (now {tokens})"


def _candidates(config: RolloutConfig | EvaluateConfig) -> str:
    return f"sampling.max_active_candidates (now {config.sampling.max_active_candidates})"


def _rewards(config: EvaluateConfig | ScoreConfig) -> str:
    return f"reward.batch_size (now {config.reward.batch_size})"
