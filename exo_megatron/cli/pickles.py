"""The program behind tools/pickle_to_safetensors.py."""

from __future__ import annotations

from pathlib import Path

from exo_megatron.errors import ConfigError

_SMALL_FILES = 64 * 2**20
"""Bytes allowed for everything but tensors."""


def convert_pickles(hf: Path, output: Path) -> int:
    """Copy an HF checkpoint with its pickled weights as safetensors, and give the exit code. One process.

    The output appears whole or not at all. It does not matter which family the model is of: nothing but the names of
    tensors is looked at.
    """
    from exo_megatron.cli.failure import report

    try:
        _convert(hf, output)
    except (Exception, KeyboardInterrupt) as error:
        return report(error)
    print(f"wrote {output}", flush=True)
    return 0


def _convert(hf: Path, output: Path) -> None:
    from exo_megatron.checkpoint.collective import check_space, write_failure
    from exo_megatron.checkpoint.hf_files import copy_hf_files
    from exo_megatron.checkpoint.publish import claim, make_staging, publish, remove_tree
    from exo_megatron.checkpoint.unpickling import refuse_unsafe_environment
    from exo_megatron.conversion.hf_reader import CONFIG_FILE, read_config
    from exo_megatron.conversion.pickles import plan_parts, write_parts

    _check_alone()
    refuse_unsafe_environment()
    read_config(hf)
    parts = plan_parts(hf)
    needed = sum(part.bytes for part in parts) + _SMALL_FILES
    claim(output, CONFIG_FILE)
    check_space(output, needed)
    try:
        staging = make_staging(output)
        try:
            copy_hf_files(hf, staging)
            write_parts(parts, staging)
            publish(staging, output, CONFIG_FILE)
        finally:
            remove_tree(staging)
    except OSError as error:
        raise write_failure(output, error, needed=needed) from error


def _check_alone() -> None:
    """Raise ConfigError, which is told once, where a launcher has started several of this process."""
    from exo_megatron.parallel.launcher import detect_launch

    launch = detect_launch()
    if launch.world_size > 1:
        raise ConfigError(
            "pickle_to_safetensors",
            f"{launch.world_size} processes were started ({launch.launcher})",
            expected="one process",
            fix="start it with python alone",
        )
