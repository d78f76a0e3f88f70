"""The `export` stage: distributed checkpoint to HF checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exo_megatron.checkpoint.directory import (
    read_spec,
    resolve_checkpoint,
    skipped_steps,
    tokenizer_path,
    weights_path,
)
from exo_megatron.checkpoint.hf_files import copy_hf_files
from exo_megatron.checkpoint.publish import claim, make_staging, publish, remove_tree, staging_path
from exo_megatron.checkpoint.safety import tensors_verified, verify_small_files
from exo_megatron.checkpoint.tensors import StoredTensors
from exo_megatron.config.stages import ExportConfig, status_directory
from exo_megatron.conversion.exporting import config_dtype, hf_tensors, plan_export
from exo_megatron.conversion.hf_reader import HF_CONFIG_FILE, read_config
from exo_megatron.conversion.hf_writer import ExportEntry, Shard, exported_config, plan_shards, write_index, write_shard
from exo_megatron.conversion.meter import ByteMeter, total_bytes
from exo_megatron.parallel.ending import failing_together, on_main
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.stages.run import say
from exo_megatron.stages.verify import check_conversion
from exo_megatron.utils.disk import check_space, reporting
from exo_megatron.utils.files import write_json


def run_export(config: ExportConfig, runtime: Runtime) -> None:
    """Convert a distributed checkpoint to the HF checkpoint `config.output`.

    Collective over the world. The checkpoint may be a converted model or any step of a training
    stage, saved at any topology. The ranks divide the safetensors files. With `dtype: keep` tensors
    have the dtype that they have in the checkpoint, and config.json names it. Checksums of tensors
    are compared while they are read, and the output is moved into its place only if all agree. An
    earlier export of this stage to the same place is replaced, unless it was changed since then.

    Raises CheckpointError for a damaged checkpoint and for an output directory that holds something
    else, and VerificationFailed with `verify`; nothing of the output is left then.
    """
    with failing_together():
        checkpoint = resolve_checkpoint(config.model.checkpoint)
    for line in skipped_steps(config.model.checkpoint):
        say(runtime, line)
    verify_small_files(checkpoint)
    with failing_together():
        entries = _plan_export(checkpoint, config)
    shards = plan_shards(entries)
    staging = staging_path(config.output)
    on_main(runtime, lambda: _prepare(config, entries))
    try:
        with tensors_verified(checkpoint), failing_together():
            _write_shards(checkpoint, staging, shards, runtime)
        on_main(runtime, lambda: _write_small_files(checkpoint, staging, shards))
        if config.verify:
            check_conversion(staging, checkpoint, config.output, "export", runtime)
        on_main(runtime, lambda: _put_in_place(staging, config))
    except Exception:
        if runtime.is_main:
            remove_tree(staging)
        raise


def _plan_export(checkpoint: Path, config: ExportConfig) -> list[ExportEntry]:
    stored = StoredTensors(weights_path(checkpoint)).of_model()
    hf = tokenizer_path(checkpoint)
    return plan_export(read_spec(checkpoint), read_config(hf), stored, config.dtype, str(hf / HF_CONFIG_FILE))


def _prepare(config: ExportConfig, entries: Sequence[ExportEntry]) -> None:
    output = config.output
    needed = total_bytes(entries)
    with reporting(output, needed=needed):
        claim(output, HF_CONFIG_FILE, status_directory(config))
        check_space(output, needed)
        make_staging(output)


def _write_shards(checkpoint: Path, staging: Path, shards: Sequence[Shard], runtime: Runtime) -> None:
    """Write this rank's shards."""
    tensors = StoredTensors(weights_path(checkpoint))
    mine = shards[runtime.rank :: runtime.world_size]
    needed = total_bytes(item for shard in shards for item in shard.entries)
    meter = ByteMeter(
        "export", total_bytes(item for shard in mine for item in shard.entries), needed, enabled=runtime.is_main
    )
    with reporting(staging, needed=needed):
        for shard in mine:
            write_shard(staging, shard, hf_tensors(shard, tensors.read), meter.count)
    meter.close()


def _write_small_files(checkpoint: Path, staging: Path, shards: Sequence[Shard]) -> None:
    hf = tokenizer_path(checkpoint)
    dtype = config_dtype([item for shard in shards for item in shard.entries])
    with reporting(staging):
        copy_hf_files(hf, staging)
        write_json(staging / HF_CONFIG_FILE, exported_config(read_config(hf), dtype))
        write_index(staging, shards)


def _put_in_place(staging: Path, config: ExportConfig) -> None:
    with reporting(config.output):
        publish(staging, config.output, HF_CONFIG_FILE, status_directory(config))
