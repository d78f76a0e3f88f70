"""Verification of a conversion: the description of the model, every tensor, and the logits, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from exo_megatron.cli.verification import EXPORT_MARKER, Check, Verification, render
from exo_megatron.config.sections import ParallelConfig
from exo_megatron.errors import ExoError, TopologyError, VerificationFailed
from exo_megatron.utils.progress import Progress

if TYPE_CHECKING:
    from exo_megatron.conversion.rules import Entry
    from exo_megatron.conversion.verifying import Comparison, Direction, TensorDifference
    from exo_megatron.models.spec import ModelSpec
    from exo_megatron.parallel.runtime import Runtime


def verify(wanted: Verification) -> int:
    """Verify as a program of its own (`tools/`): print the table and give the exit code.

    0: all that can be compared agrees. 1: something differs, or logits could not be compared for want of memory or of
    a transformers that knows the model. 2: wrong input.
    """
    from exo_megatron.checkpoint.collective import together
    from exo_megatron.checkpoint.directory import resolve_checkpoint
    from exo_megatron.cli.failure import leaving_together, report
    from exo_megatron.cli.stages import say
    from exo_megatron.parallel.runtime import distributed_runtime

    try:
        with distributed_runtime(models=not wanted.tensors_only) as runtime, leaving_together(runtime):
            checkpoint = together(lambda: resolve_checkpoint(wanted.checkpoint))
            checks = run_checks(replace(wanted, checkpoint=checkpoint), runtime)
            say(runtime, render(checks))
    except (Exception, KeyboardInterrupt) as error:
        return report(error)
    return 0 if all(check.verdict in ("pass", "not comparable") for check in checks) else 1


def check_conversion(hf: Path, checkpoint: Path, output: Path, made: Direction, runtime: Runtime) -> None:
    """Verify what a conversion has just written, with all ranks of the world. Collective over the world.

    hf, checkpoint: the two sides, one of which is the new one, not yet in its place `output`. Prints the table.
    Raises VerificationFailed if anything differs. Logits that do not fit into memory, or whose HF model
    transformers cannot load, are left out, which the table says.
    """
    from exo_megatron.checkpoint.collective import together
    from exo_megatron.checkpoint.directory import read_spec
    from exo_megatron.cli.stages import say

    spec = together(lambda: read_spec(checkpoint))
    cut = _fitting_cut(spec, runtime.world_size)
    checks = run_checks(Verification(hf, checkpoint, cut, made=made), runtime)
    say(runtime, render(checks))
    failed = [check for check in checks if check.verdict == "FAIL"]
    if failed:
        raise VerificationFailed(
            str(output),
            f"the conversion differs from its source ({failed[0].name}: {failed[0].details[0]})",
            expected="the same model on both sides",
            fix="see the table above; nothing was written to the output",
        )


def run_checks(wanted: Verification, runtime: Runtime) -> list[Check]:
    """All checks, the same on every rank. Collective over the world.

    `wanted.checkpoint` is the very directory of a checkpoint, which need not be in its place yet.
    Raises CheckpointError for what cannot be read or fails the checksums of its manifest, TopologyError where the
    model cannot be cut as asked, DataError for prompts that cannot be used.
    """
    from exo_megatron.checkpoint.collective import together
    from exo_megatron.checkpoint.directory import read_spec
    from exo_megatron.checkpoint.integrity import verify_together
    from exo_megatron.cli.verify_logits import check_logits, read_rows
    from exo_megatron.models.build import check_topology
    from exo_megatron.parallel.topology import model_parallel

    checkpoint = wanted.checkpoint
    spec = together(lambda: read_spec(checkpoint))
    together(lambda: check_topology(spec, wanted.parallel))
    if not wanted.tensors_only:
        _check_processes(wanted.parallel, runtime.world_size)
    verify_together(checkpoint)
    if wanted.tensors_only:
        return _check_weights(wanted, spec, runtime)[0]
    with model_parallel(runtime, wanted.parallel, seed=0) as topology:
        rows = together(lambda: read_rows(wanted.prompts, checkpoint, spec))
        checks, comparison = _check_weights(wanted, spec, runtime)
        return [*checks, check_logits(wanted, comparison, topology, rows, runtime)]


def _check_weights(wanted: Verification, spec: ModelSpec, runtime: Runtime) -> tuple[list[Check], Comparison]:
    from exo_megatron.checkpoint.collective import together

    hf, checkpoint = wanted.hf, wanted.checkpoint
    comparison = together(lambda: _compare_headers(hf, checkpoint, wanted.made or _direction(hf, checkpoint)))
    description = together(lambda: _check_description(comparison, checkpoint, spec))
    return [description, _check_tensors(comparison, checkpoint, runtime)], comparison


def _check_processes(cut: ParallelConfig, world_size: int) -> None:
    size = cut.processes
    if world_size % size:
        raise TopologyError(
            f"--tensor {cut.tensor} --pipeline {cut.pipeline} --expert {cut.expert}",
            f"cut the model into {size} parts, which is no divisor of {world_size}, the number of processes",
            expected=f"{size} processes, or a multiple",
            fix=f"start it with torchrun --nproc-per-node {size}, srun or mpirun, or change the three sizes",
        )


def _fitting_cut(spec: ModelSpec, world_size: int) -> ParallelConfig:
    """The finest cut of the model that `world_size` ranks can have, tensor-parallel where possible."""
    from exo_megatron.models.build import check_topology

    sizes = [size for size in range(world_size, 0, -1) if world_size % size == 0]
    for size in sizes:
        for tensor in (each for each in sizes if size % each == 0):
            cut = ParallelConfig(tensor=tensor, pipeline=size // tensor)
            try:
                check_topology(spec, cut)
            except ExoError:
                continue
            return cut
    return ParallelConfig()


def _direction(hf: Path, checkpoint: Path) -> Direction:
    """Whether the HF checkpoint says of itself that it was exported from this one."""
    from exo_megatron.checkpoint.directory import read_fingerprint
    from exo_megatron.utils.files import read_json

    marker = hf / EXPORT_MARKER
    record = read_json(marker) if marker.is_file() else None
    exported = isinstance(record, dict) and record.get("fingerprint") == read_fingerprint(checkpoint)
    return "export" if exported else "import"


def _compare_headers(hf: Path, checkpoint: Path, made: Direction) -> Comparison:
    from exo_megatron.checkpoint.directory import weights_path
    from exo_megatron.checkpoint.tensors import StoredTensors
    from exo_megatron.conversion.verifying import Comparison

    return Comparison(hf, StoredTensors(weights_path(checkpoint)).of_model(), made)


def _check_description(comparison: Comparison, checkpoint: Path, spec: ModelSpec) -> Check:
    """model.json, and the config.json that is kept with it for the way back, against the HF checkpoint's."""
    from exo_megatron.checkpoint.directory import HF_DIRECTORY, SPEC_FILE, tokenizer_path
    from exo_megatron.conversion.hf_reader import CONFIG_FILE
    from exo_megatron.conversion.importing import hf_spec
    from exo_megatron.conversion.verifying import spec_differences

    details = [f"{SPEC_FILE}: {line}" for line in spec_differences(comparison.spec, spec)]
    _, kept = hf_spec(tokenizer_path(checkpoint))
    details += [f"{HF_DIRECTORY}/{CONFIG_FILE}: {line}" for line in spec_differences(comparison.spec, kept)]
    return Check(
        "description",
        f"{SPEC_FILE}, {HF_DIRECTORY}/{CONFIG_FILE}",
        str(len(details)),
        "FAIL" if details else "pass",
        tuple(details),
    )


def _check_tensors(comparison: Comparison, checkpoint: Path, runtime: Runtime) -> Check:
    """Every tensor, the entries divided among the ranks. Collective over the world."""
    from exo_megatron.checkpoint.collective import together

    mine = comparison.entries[runtime.rank :: runtime.world_size]
    found = together(lambda: _differences(comparison, checkpoint, mine, show=runtime.is_main))
    gathered = runtime.broadcast_object(runtime.gather_objects(found) or [])
    differences = [each for part in gathered for each in part]
    details = [*comparison.problems, *map(str, differences)]
    return Check(
        "tensors",
        f"{comparison.names} tensors",
        f"{max((each.largest for each in differences), default=0.0):.3g}",
        "FAIL" if details else "pass",
        tuple(details),
    )


def _differences(
    comparison: Comparison, checkpoint: Path, entries: Sequence[Entry], *, show: bool
) -> list[TensorDifference]:
    from exo_megatron.checkpoint.directory import weights_path
    from exo_megatron.checkpoint.tensors import StoredTensors

    tensors = StoredTensors(weights_path(checkpoint))
    found: list[TensorDifference] = []
    with Progress("verify", len(entries), "entries", enabled=show) as progress:
        for entry in entries:
            found += comparison.differences(entry, tensors.read)
            progress.advance()
    return found
