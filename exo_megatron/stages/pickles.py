"""The `pickles` command: conversion of an HF checkpoint's pickled weights to safetensors."""

from __future__ import annotations

from exo_megatron.checkpoint.hf_files import copy_hf_files
from exo_megatron.checkpoint.publish import claim, make_staging, publish, remove_tree
from exo_megatron.checkpoint.safety import refuse_unsafe_environment
from exo_megatron.config.stages import PicklesConfig
from exo_megatron.conversion.hf_reader import HF_CONFIG_FILE, read_config
from exo_megatron.conversion.pickles import plan_parts, write_parts
from exo_megatron.errors import ConfigError
from exo_megatron.parallel.launch import detect_launch
from exo_megatron.utils.disk import check_space, reporting

_SMALL_FILES = 64 * 2**20
"""Bytes allowed for everything but tensors."""


def run_pickles(config: PicklesConfig) -> int:
    """Copy an HF checkpoint with its pickled weights as safetensors, and return the exit code.

    One process. The output appears whole or not at all. Models of all families can be converted:
    only the names of tensors are read. Raises CheckpointError for what cannot be read, StorageError for what cannot
    be written.
    """
    hf, output = config.hf, config.output
    _check_alone()
    refuse_unsafe_environment()
    read_config(hf)
    parts = plan_parts(hf)
    needed = sum(part.bytes for part in parts) + _SMALL_FILES
    claim(output, HF_CONFIG_FILE, output)
    check_space(output, needed)
    with reporting(output, needed=needed):
        staging = make_staging(output)
        try:
            copy_hf_files(hf, staging)
            write_parts(parts, staging)
            publish(staging, output, HF_CONFIG_FILE, output)
        finally:
            remove_tree(staging)
    print(f"wrote {output}", flush=True)
    return 0


def _check_alone() -> None:
    """Raise ConfigError, printed once, if a launcher has started several processes."""
    launch = detect_launch()
    if launch.world_size > 1:
        raise ConfigError(
            "pickles",
            f"{launch.world_size} processes were started ({launch.launcher})",
            expected="one process",
            fix="start it with python alone",
        )
