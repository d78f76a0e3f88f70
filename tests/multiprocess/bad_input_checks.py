"""Checks of tests/multiprocess/test_bad_input.py that run inside the processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exo_megatron.config.load import load_stage_config
from exo_megatron.errors import ExoError
from exo_megatron.models import policy as policy_module
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.stages.run import STAGE_FUNCTIONS, load_function


@dataclass(frozen=True)
class Told:
    """How a stage ended: what the user reads, the exit code, and whether a model had been built by then."""

    message: str
    exit_code: int
    built_model: bool


def run_badly(runtime: Runtime, *, stage: str, overrides: Sequence[str]) -> Told:
    """What the command line does with a stage, up to the error."""
    builds: list[object] = []
    original = policy_module.PolicyModel

    def counted(*args: object, **kwargs: object) -> object:
        builds.append(args)
        return original(*args, **kwargs)

    vars(policy_module)["PolicyModel"] = counted
    try:
        load_function(STAGE_FUNCTIONS[stage])(load_stage_config(stage, None, list(overrides)), runtime)
    except ExoError as error:
        return Told(str(error), error.exit_code, bool(builds))
    finally:
        vars(policy_module)["PolicyModel"] = original
    return Told("", 0, bool(builds))
