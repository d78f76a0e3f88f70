"""The stages `import` and `export`: HF checkpoint -> distributed checkpoint -> HF checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exo_megatron.cli.verification import EXPORT_MARKER
from exo_megatron.config.stages import ExportConfig, ImportConfig
from exo_megatron.utils.files import write_json
from exo_megatron.utils.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from exo_megatron.conversion.hf_writer import ExportEntry, Shard
    from exo_megatron.conversion.importing import ImportEntry
    from exo_megatron.parallel.runtime import Runtime

_MEGABYTE = 10**6


def run_import(config: ImportConfig, runtime: Runtime) -> None:
    """Convert the HF checkpoint `config.hf` to a distributed checkpoint in `config.output`. Collective over the world.

    The ranks divide the tensors, and each holds one at a time. Raises CheckpointError for what cannot be converted,
    before anything is written, and for an output directory that holds something else; VerificationFailed with
    `verify`, and the output is then not put into its place.
    """
    from exo_megatron.checkpoint.collective import together
    from exo_megatron.checkpoint.dist_format import PlannedShard, planned_state
    from exo_megatron.checkpoint.save import save_checkpoint
    from exo_megatron.cli.stages import say
    from exo_megatron.cli.tokenizer_files import check_tokenizer_files
    from exo_megatron.cli.verify import check_conversion
    from exo_megatron.conversion.importing import ImportPlan

    plan = together(lambda: ImportPlan(config.hf, config.dtype))
    for note in together(lambda: check_tokenizer_files(config.hf, plan.spec) if runtime.is_main else []):
        say(runtime, note)
    mine = _share(plan.entries, runtime)
    meter = _Meter("import", _bytes(mine), _bytes(plan.entries), runtime)

    def produce(key: str, offset: tuple[int, ...]) -> Tensor:
        data = plan.produce(key, offset)
        meter.count(data.nbytes)
        return data

    def inspect(made: Path) -> None:
        meter.close()
        if config.verify:
            check_conversion(config.hf, made, config.output, "import", runtime)

    save_checkpoint(
        config.output,
        planned_state(PlannedShard(*item.place, item.dtype) for item in mine),
        spec=plan.spec,
        hf_files=config.hf,
        step=None,
        kind="model",
        trainer_state=None,
        runtime=runtime,
        produce=produce,
        inspect=inspect,
    )


def run_export(config: ExportConfig, runtime: Runtime) -> None:
    """Convert a distributed checkpoint to the HF checkpoint `config.output`. Collective over the world.

    The checkpoint may be a converted model or any step of a training stage, saved at any topology. The ranks divide
    the safetensors files. With `dtype: keep` tensors have the type they have in the checkpoint, and config.json says
    so. Checksums of tensors are compared while they are read, and the output is put into its place only if all agree.
    Raises CheckpointError for a damaged checkpoint and for an output directory that holds something else, and
    VerificationFailed with `verify`; nothing is left then.
    """
    from exo_megatron.checkpoint.collective import on_main, together
    from exo_megatron.checkpoint.directory import resolve_checkpoint
    from exo_megatron.checkpoint.integrity import tensors_verified, verify_small_files
    from exo_megatron.checkpoint.publish import remove_tree, staging_path
    from exo_megatron.cli.verify import check_conversion
    from exo_megatron.conversion.hf_writer import plan_shards

    checkpoint = together(lambda: resolve_checkpoint(config.model.checkpoint))
    verify_small_files(checkpoint)
    entries = together(lambda: _plan_export(checkpoint, config))
    shards = plan_shards(entries)
    staging = staging_path(config.output)
    on_main(lambda: _prepare(config.output, entries))
    try:
        with tensors_verified(checkpoint):
            together(lambda: _write_shards(checkpoint, staging, shards, runtime))
        on_main(lambda: _write_small_files(checkpoint, staging, shards))
        if config.verify:
            check_conversion(staging, checkpoint, config.output, "export", runtime)
        on_main(lambda: _complete(checkpoint, staging))
        on_main(lambda: _put_in_place(staging, config.output))
    except Exception:
        if runtime.is_main:
            remove_tree(staging)
        raise


def convert(config: ImportConfig | ExportConfig) -> int:
    """Run a conversion as a program of its own (`tools/`) and give the exit code.

    Unlike the stages, it leaves nothing in the output directory but the converted checkpoint.
    """
    from exo_megatron.cli.failure import report

    try:
        _convert(config)
    except (Exception, KeyboardInterrupt) as error:
        return report(error)
    return 0


def _convert(config: ImportConfig | ExportConfig) -> None:
    from exo_megatron.cli.failure import leaving_together
    from exo_megatron.cli.stages import check_agreement, say
    from exo_megatron.config.dump import config_digest
    from exo_megatron.parallel.runtime import distributed_runtime

    with distributed_runtime(models=config.verify) as runtime, leaving_together(runtime):
        check_agreement(config_digest(config), runtime)
        if isinstance(config, ImportConfig):
            run_import(config, runtime)
        else:
            run_export(config, runtime)
        say(runtime, f"wrote {config.output}")


class _Meter:
    """Progress of the whole conversion in megabytes, estimated by rank 0 from its share."""

    def __init__(self, label: str, mine: int, total: int, runtime: Runtime) -> None:
        self._progress = Progress(label, -(-total // _MEGABYTE), "MB", enabled=runtime.is_main)
        self._mine = max(mine, 1)
        self._total = total
        self._bytes = 0
        self._shown = 0

    def count(self, number: int) -> None:
        self._bytes += number
        shown = -(-self._bytes * self._total // self._mine // _MEGABYTE)
        self._progress.advance(shown - self._shown)
        self._shown = shown

    def close(self) -> None:
        self._progress.close()


def _share(entries: Sequence[ImportEntry], runtime: Runtime) -> list[ImportEntry]:
    """This rank's entries: consecutive ones, about as many bytes for each rank."""
    total = sum(item.bytes for item in entries)
    mine: list[ImportEntry] = []
    before = 0
    for item in entries:
        if before * runtime.world_size // total == runtime.rank:
            mine.append(item)
        before += item.bytes
    return mine


def _plan_export(checkpoint: Path, config: ExportConfig) -> list[ExportEntry]:
    from exo_megatron.checkpoint.directory import read_spec, tokenizer_path, weights_path
    from exo_megatron.checkpoint.tensors import StoredTensors
    from exo_megatron.conversion.exporting import plan_export
    from exo_megatron.conversion.hf_reader import CONFIG_FILE, read_config

    stored = StoredTensors(weights_path(checkpoint)).of_model()
    hf = tokenizer_path(checkpoint)
    return plan_export(read_spec(checkpoint), read_config(hf), stored, config.dtype, str(hf / CONFIG_FILE))


def _prepare(output: Path, entries: Sequence[ExportEntry]) -> None:
    from exo_megatron.checkpoint.collective import check_space, write_failure
    from exo_megatron.checkpoint.publish import claim, make_staging

    needed = _bytes(entries)
    try:
        claim(output, EXPORT_MARKER)
        check_space(output, needed)
        make_staging(output)
    except OSError as error:
        raise write_failure(output, error, needed=needed) from error


def _write_shards(checkpoint: Path, staging: Path, shards: Sequence[Shard], runtime: Runtime) -> None:
    """Write this rank's shards."""
    from exo_megatron.checkpoint.collective import write_failure
    from exo_megatron.checkpoint.directory import weights_path
    from exo_megatron.checkpoint.tensors import StoredTensors
    from exo_megatron.conversion.exporting import hf_tensors
    from exo_megatron.conversion.hf_writer import write_shard

    tensors = StoredTensors(weights_path(checkpoint))
    mine = shards[runtime.rank :: runtime.world_size]
    needed = _bytes(item for shard in shards for item in shard.entries)
    meter = _Meter("export", _bytes(item for shard in mine for item in shard.entries), needed, runtime)
    try:
        for shard in mine:
            write_shard(staging, shard, hf_tensors(shard, tensors.read), meter.count)
    except OSError as error:
        raise write_failure(staging, error, needed=needed) from error
    meter.close()


def _bytes(entries: Iterable[ImportEntry | ExportEntry]) -> int:
    return sum(item.bytes for item in entries)


def _write_small_files(checkpoint: Path, staging: Path, shards: Sequence[Shard]) -> None:
    from exo_megatron.checkpoint.collective import write_failure
    from exo_megatron.checkpoint.directory import tokenizer_path
    from exo_megatron.checkpoint.hf_files import copy_hf_files
    from exo_megatron.conversion.exporting import config_dtype
    from exo_megatron.conversion.hf_reader import CONFIG_FILE, read_config
    from exo_megatron.conversion.hf_writer import exported_config, write_index

    hf = tokenizer_path(checkpoint)
    dtype = config_dtype([item for shard in shards for item in shard.entries])
    try:
        copy_hf_files(hf, staging)
        write_json(staging / CONFIG_FILE, exported_config(read_config(hf), dtype))
        write_index(staging, shards)
    except OSError as error:
        raise write_failure(staging, error, needed=None) from error


def _complete(checkpoint: Path, staging: Path) -> None:
    from exo_megatron.checkpoint.collective import write_failure
    from exo_megatron.checkpoint.directory import read_fingerprint, read_step
    from exo_megatron.checkpoint.manifest import list_files

    try:
        record = {
            "checkpoint": str(checkpoint.resolve()),
            "fingerprint": read_fingerprint(checkpoint),
            "step": read_step(checkpoint),
            "files": {name: (staging / name).stat().st_size for name in list_files(staging)},
        }
        write_json(staging / EXPORT_MARKER, record)
    except OSError as error:
        raise write_failure(staging, error, needed=None) from error


def _put_in_place(staging: Path, output: Path) -> None:
    from exo_megatron.checkpoint.collective import write_failure
    from exo_megatron.checkpoint.publish import publish

    try:
        publish(staging, output, EXPORT_MARKER)
    except OSError as error:
        raise write_failure(output, error, needed=None) from error
